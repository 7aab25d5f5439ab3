"""run_toys.py RECIPE [train]: a pipeline of toy stages; with train they count as stages that save when told to stop."""

import sys
from pathlib import Path

from rich.console import Console

import launch.pipeline.run as running
from launch import stages
from launch.launcher import Machine
from launch.pipeline.recipe import load_pipeline

stages.KINDS["toy"] = stages.Stage("toy", "toy_stage", ("toy_stage", "ToyConfig"), trains="train" in sys.argv)
running.stage_command = lambda stage, arguments, machine: [sys.executable, "-m", stage.module, *arguments]
options = running.RunOptions(machine=Machine(ranks=1), doctor=False)
sys.exit(running.PipelineRun(load_pipeline(Path(sys.argv[1])), options, Console()).run())
