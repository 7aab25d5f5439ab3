"""``python planned.py PLAN.json``: one rank of several runs of the stage, one after another.

The plan is a list of runs, each with ``arguments`` of the reward stage, a ``port`` for its ranks to meet at, and a
file ``said`` for what its main rank prints. Every run is a process of its own, forked from this one: importing is
what takes long. This process prints how each run ended.
"""

import json
import os
import sys
from pathlib import Path

from torch._inductor import compile_fx

from reward import stage
from reward.__main__ import main
from rlhf.engine import zero

IMPORTED_BY_EVERY_RUN = stage, zero, compile_fx


def run_alone(run: dict) -> int:
    """The exit code of a child that does the run."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ["MASTER_PORT"] = str(run["port"])
    if os.environ["RANK"] == "0":
        said = os.open(run["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
    code = main(run["arguments"])
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    for place, each in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        print(f"run {place} ended with {run_alone(each)}", flush=True)
