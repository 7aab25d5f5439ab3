"""``python planned.py PLAN.json``: one rank of several runs of the stage, one after another; see tests/forked.py."""

import sys
from pathlib import Path

from torch._inductor import compile_fx

from reward import stage
from reward.__main__ import main
from rlhf.engine import zero
from tests.forked import run_plan

IMPORTED_BY_EVERY_RUN = stage, zero, compile_fx

if __name__ == "__main__":
    run_plan(Path(sys.argv[1]), main)
