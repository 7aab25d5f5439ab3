"""One pipeline at a time in a folder, or several that each have other stages of it: told to stop by signal or file, and
with nothing left of an earlier one."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.jobs.supervisor import ASKED_VARIABLE
from launch.runs import NOTES, Pipeline
from rlhf.core.clock import process_started
from rlhf.core.errors import STOP_FILE
from rlhf.core.owner import check_not_owned, owning

MARK, STAGE_MARK = "RLHF_PIPELINE", "RLHF_STAGE"
"""Environment variables that the processes of a pipeline carry: its folder, and the stage."""
OWNERS = "owners"
"""Folder in the pipeline's notes: a folder for each stage that a call of its own works on (--only)."""
ONE_REQUEST_SECONDS = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Requests to stop: signals to this process, a file STOP in the pipeline's folder, and what its job has noted."""

    def __init__(self, folder: Path, *, others: bool = False) -> None:
        """``others``: further calls work in the folder, for which STOP is meant as well: it stays."""
        self._file, self._others, self._reason = folder / STOP_FILE, others, ""
        asked = os.environ.get(ASKED_VARIABLE)
        self._asked = Path(asked) if asked else None
        self._first_signal: float | None = None
        self.at_once = False
        """Somebody asked again: signals of one moment are one request (a closing terminal sends two)."""
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop; empty as long as nobody asked."""
        if not self._reason and self._file.exists():
            self._reason = f"{self._file} is there"
            if not self._others:
                self._file.unlink(missing_ok=True)
        if not self._reason and self._asked is not None and self._asked.exists():
            self._reason = " ".join(sorted({*self._asked.read_text().split()}))
        return self._reason

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(OSError):
            if self._file.stat().st_mtime < process_started():  # meant for an earlier one
                self._file.unlink()
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays nohup
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self._first_signal = self._first_signal or now
        self.at_once |= now - self._first_signal > ONE_REQUEST_SECONDS
        self._reason = self._reason or signal.Signals(number).name


@contextlib.contextmanager
def alone(pipeline: Pipeline, only: Sequence[str] = ()) -> Iterator[None]:
    """Hold the pipeline's folder; what an earlier pipeline left running there is ended.

    Args:
        pipeline: that works in the folder.
        only: the stages of a call that works on these alone: it holds them, and not the rest.
    Raises:
        Owned: if another pipeline works in it, or a call on one of these stages.
        ConfigError: if it cannot be written to.
    """
    folder, notes = pipeline.output, pipeline.output / NOTES
    with contextlib.ExitStack() as held:
        for name in only:
            held.enter_context(owning(folder, f"a pipeline with --only {name}", place=notes / OWNERS / name))
        if not only:
            held.enter_context(owning(folder, "a pipeline", place=notes))
        # Of two that begin at one moment both may be refused, but never both go on: each looks when it has claimed.
        for place in [notes] if only else sorted((notes / OWNERS).glob("*")):
            check_not_owned(folder, place=place)
        kill_all(processes_of(folder, only))  # its pipeline is gone, and it would write where this one does
        yield


def mark(folder: Path, stage: str) -> dict[str, str]:
    """The environment variables by which leftovers are known."""
    return {MARK: str(folder.resolve()), STAGE_MARK: stage}


def processes_of(folder: Path, only: Sequence[str] = ()) -> list[psutil.Process]:
    """What carries the mark of ``folder``, and of these stages, but for this process and those above it."""
    wanted, family = str(folder.resolve()), {os.getpid(), *(each.pid for each in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marks = process.environ() if process.pid not in family else {}
            if marks.get(MARK) == wanted and (not only or marks.get(STAGE_MARK) in only):
                found.append(process)
    return found


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """Kill ``processes``, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
