"""run_toys.py RECIPE [train [hasty]] [two] [allocated | hostfile FILE] [only NAME]: a pipeline of toy stages.

With train they count as stages that save when told to stop, and get a second for it with hasty; with two, as many run
at a time; with allocated, on what the SLURM allocation has.
"""

import sys
from pathlib import Path

import launch.pipeline.run as running
from launch import stages
from launch.commands.pipeline import console
from launch.jobs.launcher import Machine, find_machine
from launch.pipeline.recipe import load_pipeline
from rlhf.core.errors import UserError

stages.STAGES["toy"] = stages.Stage(
    name="toy", module="toy_stage", config="toy_stage:ToyConfig", trains="train" in sys.argv
)
hostfile = Path(sys.argv[sys.argv.index("hostfile") + 1]) if "hostfile" in sys.argv else None
elsewhere = hostfile is not None or "allocated" in sys.argv
if not elsewhere:
    running.stage_command = lambda stage, arguments, machine: [sys.executable, "-m", stage.module, *arguments]
grace = 1.0 if "hasty" in sys.argv else 600.0
only = tuple(sys.argv[sys.argv.index("only") + 1 :]) if "only" in sys.argv else ()
at_once = 2 if "two" in sys.argv else None
try:
    machine = find_machine(None, hostfile) if elsewhere else Machine(ranks=1)
    options = running.RunOptions(machine=machine, at_once=at_once, only=only, doctor=False, grace_seconds=grace)
    sys.exit(running.PipelineRun(load_pipeline(Path(sys.argv[1])), options, console()).run())
except UserError as error:
    sys.exit(str(error))
