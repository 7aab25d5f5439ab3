"""Seconds from the command to the first step, as a user starts a run: with rehearsal and fresh processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.stages import rows_settings
from benchmarks.gpu.world import Skipped, World

LIMIT_SECONDS = 120


def cells(world: World) -> list[Cell]:
    return [Cell(part="start", name="python -m reward", function=f"{__name__}:measure", seconds=45)]


def measure(world: World) -> dict[str, Any]:
    """Time the start of ``python -m reward`` up to the beginning of its first step; the run is ended then."""
    output = world.work / "runs" / "start"
    settings = [f"output={output}", f"model.path={world.reward}", f"train.global_batch_size={world.sizes.pairs}"]
    settings += [
        f"train.micro_batch_tokens={world.sizes.micro_batch_tokens}",
        "train.max_steps=1000",
        "train.epochs=1000",
    ]
    settings += ["train.evaluate_every=0", *rows_settings(world, next(iter(world.rows)), world.sizes.tokens[0])]
    log = world.work / "start.log"
    began = time.time()
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "reward", *settings],
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        while time.time() - began < LIMIT_SECONDS:
            with contextlib.suppress(OSError, ValueError, IndexError):
                file = output / "metrics.jsonl"
                first = json.loads(file.read_text().splitlines()[0])
                return {"seconds": time.time() - began - first["time/step_seconds"]}
            if process.poll() is not None:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"exit code {process.returncode}: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise Skipped(f"no step within {LIMIT_SECONDS} s")
