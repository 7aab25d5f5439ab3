"""``rlhf doctor``: is this machine ready for a run, and if not, what to do."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands.arguments import Subparsers, add_machine, add_recipes, add_stage, command
from launch.screen import console

if TYPE_CHECKING:
    from launch.doctor import Finding, Subject

_DESCRIPTION = """\
Check the machine before a run: versions, build tools, DeepSpeed's compiled ops, devices, host and shared memory, disk,
hub access, SLURM, the nodes of a hostfile, and an all-reduce over ranks that are really started. With a recipe, of a
stage or a pipeline, it is checked for that run: its DeepSpeed configurations and the ops to offload with, the files
that it reads, room for checkpoints, memory for the models.

Exit status: 0 without failures (warnings do not count); 1 with; 2 if the recipe is refused.
"""
_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def add_parser(subparsers: Subparsers) -> None:
    parser = command(subparsers, "doctor", run, help="check this machine before a run", description=_DESCRIPTION)
    add_recipes(parser, "a recipe of a stage (may be given again, later ones win) or of a pipeline", required=False)
    add_stage(parser)
    parser.add_argument("--set", metavar="key=value", nargs="+", default=[], help="settings of the recipe")
    add_machine(parser)
    parser.add_argument("--quick", action="store_true", help="only what takes a few seconds in all")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from launch.doctor import run_checks

    working = Console(stderr=True, markup=False)
    with contextlib.redirect_stdout(sys.stderr), working.status("starting") as status:  # DeepSpeed talks on stdout
        subject = _subject(options)
        findings = run_checks(subject, quick=options.quick, notice=lambda name: status.update(f"looking at: {name}"))
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in findings], indent=2))
    else:
        _print(findings)
    return 1 if any(each.status == "failure" for each in findings) else 0


def _print(findings: Sequence["Finding"]) -> None:
    """One line a finding and one for its remedy, then the count."""
    from rich.text import Text

    screen = console()
    for each in findings:
        status = Text(f"{each.status:<8}", style=_STYLES[each.status])
        screen.print(status.append(f" {each.check}: {each.text}", style="default"), soft_wrap=True)
        if each.status != "ok" and each.remedy:
            screen.print(Text(f"{'':<8}   remedy: {each.remedy}", style="italic"), soft_wrap=True)
    counts = {status: sum(each.status == status for each in findings) for status in _STYLES}
    if counts["failure"]:
        screen.print(f"not ready: {counts['failure']} failure(s), {counts['warning']} warning(s)")
    else:
        screen.print(f"ready: {counts['ok']} ok, {counts['warning']} warning(s)")


def _subject(options: argparse.Namespace) -> "Subject":
    """The run of the recipes; any run, if there is none."""
    from launch.doctor import Subject
    from launch.pipeline.recipe import load_pipeline
    from launch.runs import PipelineStage
    from launch.stages import read_stage

    machine = {"ranks": options.ranks, "hostfile": options.hostfile, "hosts": _hosts(options.hostfile)}
    if not options.config:
        return Subject(**machine)
    if len(options.config) == 1 and _is_pipeline(options.config[0]):
        pipeline = load_pipeline(options.config[0], options.set)
        return Subject(output=pipeline.output, stages=pipeline.stages, pipeline=pipeline, **machine)
    stage, config = read_stage(options.config, options.set, options.stage, program="rlhf doctor")
    return Subject(output=config.output, stages=(PipelineStage(stage=stage, config=config),), **machine)


def _hosts(hostfile: Path | None) -> dict[str, int]:
    from launch.jobs.hostfile import read_hostfile
    from rlhf.core.errors import ConfigError

    if hostfile is None:
        return {}
    try:
        return read_hostfile(hostfile)
    except ConfigError:
        return {}  # the check of the hostfile says so


def _is_pipeline(path: Path) -> bool:
    import yaml

    from rlhf.config import read_recipe

    try:
        return "stages" in read_recipe(path)
    except (OSError, ValueError, yaml.YAMLError):
        return False  # the stage's parser says what is wrong with it
