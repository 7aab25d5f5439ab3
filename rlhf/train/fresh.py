"""The fresh process of a run: it opens folders as a plain user would, and says whether they give what was expected.

It imports what it needs while the run reads its data, is asked once before the first step and once at the end, and in
between waits for the pipe from this process to bring something, or to close. What it runs is
:mod:`rlhf.train.reloading`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.core.errors import ModelError
from rlhf.core.ports import free_port
from rlhf.engine.ranks import Ranks
from rlhf.engine.stop import sheltering_children

SECONDS_TO_END = 10.0


class _FreshProcess:
    def __init__(self, rank: Mapping[str, str] | None = None) -> None:
        """``rank``: the environment of a rank, for one that is asked together with others."""
        self._asked = False
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # it is there as long as the process
        with sheltering_children():  # who asks the run to stop signals all its processes
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf.train.reloading"],
                text=True,
                env=plain_environment() if rank is None else rank_environment(rank),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
            )

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self.settle()
        self._asked = True
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def settle(self) -> None:
        """Drop the answer to an earlier question that nobody has waited for."""
        if self._asked:
            self.answer()

    def answer(self) -> dict[str, Any]:
        """What it says to the question; waits for it."""
        assert self._process.stdout is not None
        self._asked = False
        answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        said = f"the fresh process ended with exit code {code}{' (out of memory?)' if code == -9 else ''}"
        return {"fault": f"{said} {self._last_words()}".rstrip()}

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._asked:  # what it is at is of no use to anybody
            self._process.kill()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def _last_words(self) -> str:
        size = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, size - 2000))
        return self._complaints.read().decode(errors="replace").strip()


_process: _FreshProcess | None = None  # a process has one run, and so one of these


def start_fresh_process() -> None:
    """Let it import what it needs from now on; it would be started when it is asked first."""
    _living()


def check_in_fresh_process(module: str, folder: Path, request: dict[str, Any]) -> dict[str, float]:
    """What ``module.check(folder, request)`` says there: differences to what was expected, by name.

    Raises:
        ModelError: saying what is wrong, if it does not reproduce the values of ``request``.
    """
    return begin_check(module, folder, request)()


def begin_check(module: str, folder: Path, request: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """The same, for who does something else meanwhile: what is returned waits for the answer. One at a time."""
    process = _living()
    process.ask({"module": module, "folder": str(folder.absolute()), "request": request})

    def differences() -> dict[str, float]:
        answer = process.answer()
        if "fault" in answer:
            raise ModelError(answer["fault"])
        return answer["differences"]

    return differences


def check_on_all_ranks(module: str, folder: Path, request: dict[str, Any], ranks: Ranks) -> dict[str, float]:
    """The same by a fresh process of each rank, which share the model out among them. Every rank must call it.

    Raises:
        ModelError: on all ranks, saying what is wrong.
    """
    address, port = ranks.broadcast_object((os.environ["MASTER_ADDR"], str(free_port())) if ranks.is_main else None)
    numbers = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": ranks.local_rank}
    numbers |= {"LOCAL_WORLD_SIZE": ranks.local_size}
    place = {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": address, "MASTER_PORT": port}
    process = _FreshProcess(place)
    try:
        shared = request | {"on_all_ranks": True}
        process.ask({"module": module, "folder": str(folder.absolute()), "request": shared})
        answer = process.answer()
    finally:
        process.end()
    fault = next((each["fault"] for each in ranks.gather_objects(answer) if "fault" in each), None)
    if fault is not None:
        raise ModelError(fault)
    return answer["differences"]


def end_fresh_process() -> None:
    """End it, if there is one. It also ends by itself with this process, however that dies."""
    global _process
    if _process is not None:
        _process.end()
        _process = None


def _living() -> _FreshProcess:
    global _process
    if _process is None or not _process.lives:
        _process = _FreshProcess()
    return _process


def plain_environment() -> dict[str, str]:
    """The environment without what a launcher set: the fresh process is nobody's rank, and it reads files only."""
    launched: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "TORCHELASTIC_", "DS_", "SLURM_")
    if "LOCAL_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        launched += ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # shares of the ranks, which wait for this one now
    return {**_without(launched), "CUDA_VISIBLE_DEVICES": ""}


def rank_environment(rank: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process for one that has the same devices, and is a rank of its own kind."""
    launched = ("TORCHELASTIC_", "DS_", "SLURM_")
    return {**_without(launched), **rank}


def _without(launched: tuple[str, ...]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
