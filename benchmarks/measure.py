"""``python -m benchmarks.measure STAGE REPORT [--config RECIPE] [key=value ...]``: what two steps really take.

Starts as a stage does, under any launcher, and stops where the first checkpoint would be written. Every rank writes
``REPORT.rankN.json`` with the peak of its resident memory (:class:`Resident`), that of the system (VmHWM) and, on a
GPU, of what torch allocated there. benchmarks/plan_check.py compares such peaks with plans.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

THREADS = "1"
"""Threads of each rank."""
STEPS = 2
"""Steps to measure: from the second on, Adam's moments lie beside the activations."""


def memory(field: str) -> int:
    """``VmRSS`` or its peak ``VmHWM``, in bytes; Linux only.

    Not ru_maxrss of getrusage: Linux carries the parent's peak over into a child that it starts.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status: no {field}; resident memory is measured on Linux only")


class Resident:
    """The peak of resident memory as it is on a machine with memory to spare.

    A busy machine takes back pages of programs and libraries, which it can read again, from a process that has not
    used them for a moment; a peak would depend on who else is there. Those that were resident when this began count
    as if they still were.

    Args:
        read: private bytes of the process, and those of files.
    """

    def __init__(self, read: Callable[[], tuple[int, int]]) -> None:
        self._read = read
        private, self._libraries = read()
        self.peak = private + self._libraries
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def look(self) -> None:
        private, files = self._read()
        self.peak = max(self.peak, private + max(files, self._libraries))

    def start(self) -> None:
        self._thread.start()

    def end(self) -> int:
        """The peak; what lasted for a few milliseconds alone may be missing."""
        self._over.set()
        self._thread.join()
        self.look()
        return self.peak

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.look()


def private_and_files() -> tuple[int, int]:
    """Resident bytes of this process: its own, and those of mapped files."""
    return memory("RssAnon") + memory("RssShmem"), memory("RssFile")


def measure(stage: str, settings: Sequence[str], *, ranks: int, folder: Path, timeout_seconds: float) -> list[dict]:
    """Run two steps of ``stage`` on ``ranks`` processes of this machine; what each rank has measured.

    Modules in ``folder`` can be imported there: reward functions, for instance.

    Raises:
        RuntimeError: if a rank fails, with the end of what it said; the others are ended.
    """
    from rlhf.core.ports import free_port

    report = folder / "peak"
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "benchmarks.measure", stage, str(report), *settings, f"output={folder / 'run'}"]
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("wb") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=timeout_seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    if any(codes):
        failed = next(rank for rank, code in enumerate(codes) if code)
        raise RuntimeError(f"{stage} {' '.join(settings)}: rank {failed}: {logs[failed].read_text()[-3000:]}")
    return [json.loads(report.with_name(f"{report.name}.rank{rank}.json").read_text()) for rank in range(ranks)]


def main(argv: Sequence[str]) -> int:
    from launch.stages import STAGES
    from rlhf.train.command import stage_main

    stage, report, *rest = (part for part in argv if not part.startswith(("--local_rank", "--local-rank")))
    chosen = STAGES[stage]
    module = f"{chosen.module}.stage"
    importlib.import_module(module)  # before anything in it is replaced
    found: dict[str, Any] = {}
    watches: list[Resident] = []
    _watch_loading(found, watches)
    _stop_at_checkpoint(found, Path(report), watches)
    settings = [*rest, f"train.max_steps={STEPS}", "train.evaluate_every=0", "train.checkpoint_every=0"]
    settings += ["train.publish=none", "train.tensorboard=false"]
    try:
        return stage_main(chosen.config_class(), module, settings, program="measure", description="Measure two steps.")
    except _Measured:
        return 0


class _Measured(BaseException):
    """The peak is known; what follows is of no interest."""


def _watch_loading(found: dict[str, Any], watches: list[Resident]) -> None:
    """Note what the process takes before the first model is loaded, and watch it from then on."""
    from rlhf.models import backbones

    check = backbones.check_host_memory

    def watched(*args: Any, **more: Any) -> None:
        if not watches:
            found["before_models"] = memory("VmRSS")
            watches.append(Resident(private_and_files))
            watches[0].start()
        check(*args, **more)

    backbones.check_host_memory = watched


def _stop_at_checkpoint(found: dict[str, Any], report: Path, watches: list[Resident]) -> None:
    """The loop saves after its last step: measure there instead."""
    import torch

    from rlhf.train import loop

    def measured(engine: Any, *args: Any) -> None:
        seen = max(watch.end() for watch in watches)
        found.update(peak_resident=max(memory("VmHWM"), seen), system_peak=memory("VmHWM"), resident=memory("VmRSS"))
        if torch.cuda.is_available():
            found["peak_device"] = torch.cuda.max_memory_allocated()
        path = report.with_name(f"{report.name}.rank{engine.ranks.rank}.json")
        path.write_text(json.dumps(found))
        engine.ranks.barrier()
        raise _Measured

    loop.save = measured


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
