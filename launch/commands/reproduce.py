"""``rlhf reproduce FILE``: make the run of a capsule again, and say whether it came to the same."""

import argparse
from dataclasses import replace
from pathlib import Path

from launch.commands.arguments import Subparsers, add_settings, command
from launch.commands.pipeline import add_run_options, dry_run, run_settings
from launch.screen import console
from rlhf.core.files import DATA, ENVIRONMENT
from rlhf.core.paths import home_path

_DESCRIPTION = """\
Run the stage of a capsule (rlhf capsule) with its settings on as many ranks (on hosts and in allocations of several
nodes: on all devices there), and compare all metrics of the steps that
the capsule has. The last line says: equal; within rounding (a thousandth); or different, first at step n. What is
not as it was then (versions, code, data, devices) is named before it.

Models and data are those that the recipe names; settings behind FILE win over it, such as data.train=ELSEWHERE.

Exit status: 0 equal or within rounding; 1 different, or the run failed; 2 refused; 75 stopped, to be continued.
"""


def add_parser(subparsers: Subparsers) -> None:
    about = "make the run of a capsule again and compare"
    parser = command(subparsers, "reproduce", run, help=about, description=_DESCRIPTION)
    parser.add_argument("capsule", metavar="FILE", type=home_path, help="what rlhf capsule wrote")
    place = "folder of the new run (default: runs/reproduce and the name of FILE)"
    parser.add_argument("--output", type=home_path, metavar="FOLDER", help=place)
    add_run_options(parser)
    add_settings(parser, "settings; they win over those of the capsule")


def run(options: argparse.Namespace) -> int:
    """Run and compare.

    Raises:
        UserError: if FILE is no capsule, or a setting of it is refused.
    """
    from launch.capsule.capsule import changes_since, read_capsule, stage_of
    from launch.capsule.comparing import compare_runs
    from launch.pipeline.run import PipelineRun
    from launch.report.reading import METRICS, read_json, read_lines
    from launch.runs import Pipeline, PipelineStage
    from rlhf.config import flat, load_config

    capsule = read_capsule(options.capsule)
    stage = stage_of(capsule)
    folder = options.output or Path("runs/reproduce") / options.capsule.stem
    settings = flat(capsule.recipe) | {"output": str(folder / stage.name)}
    config = load_config(stage.config_class(), (), options.overrides, settings=settings, program="rlhf reproduce")
    entry = PipelineStage(name=stage.name, stage=stage, config=config)
    pipeline = Pipeline(name="reproduce", output=folder, stages=(entry,), elsewhere="--output FOLDER")
    if options.dry_run:
        return dry_run(pipeline, options)
    how = run_settings(options)
    if how.machine.ranks is None and not how.machine.hosts:  # hosts and allocations have the ranks that they have
        how = replace(how, machine=replace(how.machine, ranks=capsule.ranks))
    screen = console()
    code = PipelineRun(pipeline, how, screen).run()
    if code:
        return code
    made = entry.output
    for line in changes_since(capsule, read_json(made / ENVIRONMENT), read_json(made / DATA)):
        screen.print(f"not as it was: {line}", soft_wrap=True, markup=False, highlight=False)
    verdict = compare_runs(capsule.metrics, read_lines(made / METRICS)[0])
    screen.print(str(verdict), soft_wrap=True, markup=False, highlight=False)
    return 1 if verdict.kind == "different" else 0
