"""``rlhf doctor``: is this machine ready for a run, and if not, what to do."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.arguments import positive_int
from launch.stages import training
from rlhf.core.paths import home_path, recipe_path

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


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine before a run",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    several = "a recipe of a stage (may be given again, later ones win) or of a pipeline"
    parser.add_argument("--config", metavar="RECIPE", type=recipe_path, action="append", default=[], help=several)
    which = "the stage of the recipe (default: the one that takes it)"
    parser.add_argument("--stage", choices=[*training()], help=which)
    parser.add_argument("--set", metavar="key=value", nargs="+", default=[], help="settings of the recipe")
    parser.add_argument("--hostfile", type=home_path, help="machines to use over ssh, one 'HOST slots=N' a line")
    parser.add_argument("--ranks", type=positive_int, help="processes here (default: all GPUs, or 2 on a CPU)")
    parser.add_argument("--quick", action="store_true", help="only what takes a few seconds in all")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from launch.doctor import run_checks

    console, working = Console(highlight=False, markup=False), Console(stderr=True, markup=False)
    with contextlib.redirect_stdout(sys.stderr), working.status("starting") as status:  # DeepSpeed talks on stdout
        subject = _subject(options)
        findings = run_checks(
            subject, quick=options.quick, notice=lambda name: status.update(f"looking at: {name}")
        )
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in findings], indent=2))
    elif console.is_terminal:
        _print_table(findings, console)
    else:
        print(*plain_lines(findings), sep="\n")
    return 1 if any(each.status == "failure" for each in findings) else 0


def plain_lines(findings: Sequence["Finding"]) -> list[str]:
    """One line a finding and one for its remedy, then the count."""
    lines = []
    for each in findings:
        lines.append(f"{each.status:<8} {each.check}: {each.text}")
        if each.status != "ok" and each.remedy:
            lines.append(f"{'':<8}   remedy: {each.remedy}")
    return [*lines, verdict(findings)]


def verdict(findings: Sequence["Finding"]) -> str:
    """All of it in one line."""
    counts = {status: sum(each.status == status for each in findings) for status in _STYLES}
    if counts["failure"]:
        return f"not ready: {counts['failure']} failure(s), {counts['warning']} warning(s)"
    return f"ready: {counts['ok']} ok, {counts['warning']} warning(s)"


def _print_table(findings: Sequence["Finding"], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "check", "finding", show_lines=True)
    for each in findings:
        text = Text(each.text)
        if each.status != "ok" and each.remedy:
            text.append(f"\nremedy: {each.remedy}", style="italic")
        table.add_row(Text(each.status, style=_STYLES[each.status]), each.check, text)
    console.print(table)
    console.print(verdict(findings))


def _subject(options: argparse.Namespace) -> "Subject":
    """The run of the recipes; any run, if there is none."""
    from launch.doctor import PlannedStage, Subject
    from launch.stages import read_stage

    machine = {"ranks": options.ranks, "hostfile": options.hostfile, "hosts": _hosts(options.hostfile)}
    if not options.config:
        return Subject(**machine)
    if len(options.config) == 1 and _is_pipeline(options.config[0]):
        from launch.pipeline.recipe import load_pipeline
        from launch.pipeline.subject import pipeline_subject

        return pipeline_subject(load_pipeline(options.config[0], options.set), **machine)
    stage, config = read_stage(options.config, options.set, options.stage, program="rlhf doctor")
    return Subject(output=config.output, stages=(PlannedStage(stage=stage, config=config),), **machine)


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
