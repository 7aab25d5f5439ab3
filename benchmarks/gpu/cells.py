"""Measurements one after the other, each in a process of its own.

What a process imports takes longer than most measurements. So one process imports everything and touches no GPU, and
every measurement is a fork of it: fresh memory, nothing left of the one before. Where something has touched the GPU
in the meantime, after which no fork can use it, measurements start cold.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.world import Skipped, World

NO_FORK = 77
"""Exit code of a fork that cannot use the GPU."""
MODULES = (
    "torch",
    "transformers",
    "deepspeed",
    "reward.stage",
    "policy.preference.stage",
    "policy.sft.stage",
    "policy.ppo.stage",
    "launch.stages",
)
FROM_THE_SIDE = ("pair_contender", "ppo_contender", "ppo_workload")
"""Files of benchmarks that are scripts, too, and so are found in their own folder."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement."""

    part: str
    name: str
    function: str
    """module:function, called with the world and ``arguments``; it returns figures, or raises Skipped."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float
    """What it is expected to take on a GPU, at most: none begins that would not end in time."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What a process that starts cold for it has set; empty: a fork will do."""


@dataclass(kw_only=True)
class Result:
    """What came of a cell."""

    part: str
    name: str
    arguments: Mapping[str, Any]
    seconds: float = 0.0
    figures: dict[str, Any] | None = None
    skipped: str = ""
    failed: str = ""


def warm_up() -> None:
    """Import what measurements need, without a thread or a GPU."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # ask the driver's library, not the driver
    beside = str(Path(__file__).resolve().parent.parent)
    if beside not in sys.path:
        sys.path.insert(0, beside)
    for name in (*MODULES, *FROM_THE_SIDE):
        importlib.import_module(name)


class Runner:
    """Runs cells, remembers whether forks can use the GPU."""

    def __init__(self, world: World) -> None:
        self._world, self._forks, self._count = world, True, 0
        (world.work / "cells").mkdir(parents=True, exist_ok=True)

    def run(self, cell: Cell, limit_seconds: float) -> Result:
        began = time.monotonic()
        result = self._run(cell, limit_seconds)
        if result is None:
            self._forks = False
            print("forks cannot use the GPU: measurements start cold", file=sys.stderr, flush=True)
            result = self._run(cell, limit_seconds)
        assert result is not None
        result.seconds = time.monotonic() - began
        return result

    def start(self, cell: Cell) -> "Started":
        self._count += 1
        base = self._world.work / "cells" / f"{self._count:03d}"
        asked = base.with_suffix(".json")
        asked.write_text(json.dumps(asdict(cell)))
        cold = bool(cell.environment) or not self._forks
        return Started(cell, self._world, base, cold=cold)

    def _run(self, cell: Cell, limit_seconds: float) -> Result | None:
        started = self.start(cell)
        return started.result(limit_seconds)


class Started:
    """A cell whose process runs."""

    def __init__(self, cell: Cell, world: World, base: Path, *, cold: bool) -> None:
        self.cell, self._base = cell, base
        self._log, self._found = base.with_suffix(".log"), base.with_suffix(".found")
        if cold:
            command = [sys.executable, "-m", "benchmarks.gpu.cells", str(world.work / "world.json"), str(base)]
            with self._log.open("wb") as log:
                environment = os.environ | dict(cell.environment)
                self._pid = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
                ).pid
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.setsid()
            with self._log.open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os._exit(_work(cell, world, self._found))

    def result(self, limit_seconds: float) -> Result | None:
        """What it found; ``None`` if forks cannot use the GPU. Its whole group ends when the time is up."""
        end = time.monotonic() + limit_seconds
        code = self._wait(end)
        result = Result(part=self.cell.part, name=self.cell.name, arguments=self.cell.arguments)
        if code is None:
            result.failed = f"not done after {limit_seconds:.0f} s: ended"
        elif code == NO_FORK:
            return None
        elif self._found.exists():
            vars(result).update(json.loads(self._found.read_text()))
        else:
            result.failed = f"exit code {code}: {self._last_line()}"
        return result

    def _wait(self, end: float) -> int | None:
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                return None
            time.sleep(0.02)

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"


def _work(cell: Cell, world: World, found: Path) -> int:
    """Call the function of ``cell`` and write what came of it; the exit code of its process."""
    import torch

    if torch.cuda._is_in_bad_fork():
        return NO_FORK
    told: dict[str, Any]
    try:
        module, _, name = cell.function.partition(":")
        told = {"figures": getattr(importlib.import_module(module), name)(world, **cell.arguments)}
    except Skipped as why:
        told = {"skipped": str(why)}
    except BaseException as error:
        traceback.print_exc()
        told = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"}
    part = found.with_suffix(".part")
    part.write_text(json.dumps(told))
    part.replace(found)
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def main(world: str, base: str) -> None:
    """A cell in a process that starts cold."""
    path = Path(base)
    warm_up()
    os._exit(
        _work(
            Cell(**json.loads(path.with_suffix(".json").read_text())),
            World.read(Path(world)),
            path.with_suffix(".found"),
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
