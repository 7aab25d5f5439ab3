"""Several runs of a stage in one rank's process, each in a fork of it: importing is what takes long."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def run_plan(plan: Path, main: Callable[[Sequence[str]], int], prepare: Callable[[dict], None] = lambda run: None):
    """Do the runs of a JSON list, and print how each ended: its exit code, negative if it was killed.

    Args:
        plan: of runs with ``arguments``, a ``port`` for the ranks to meet at, and a file ``said`` for what the main
            rank prints.
        main: of the stage.
        prepare: called in the process of each run before it begins.
    """
    for place, run in enumerate(json.loads(plan.read_text())):
        print(f"run {place} ended with {_run_alone(run, main, prepare)}", flush=True)


def _run_alone(run: dict, main: Callable[[Sequence[str]], int], prepare: Callable[[dict], None]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ["MASTER_PORT"] = str(run["port"])
    if os.environ["RANK"] == "0":
        said = os.open(run["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
    prepare(run)
    code = main(run["arguments"])
    sys.stdout.flush()
    os._exit(code)
