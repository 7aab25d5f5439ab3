"""``rlhf pipeline``: all stages of a recipe, one after the other, each started, continued or skipped as it must be."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.arguments import SettingsParser, positive_int
from rlhf.core.paths import home_path, recipe_path

if TYPE_CHECKING:
    from rich.console import Console

    from launch.pipeline.recipe import Pipeline
    from launch.pipeline.run import RunOptions

ANY_CODE = "results of another version of the code count, too"
_DESCRIPTION = """\
Run the stages of a pipeline recipe in their order, each as a job of its own under the deepspeed launcher. A stage
that is finished with the same settings, inputs and code is skipped; one that was begun goes on from its checkpoint;
one whose settings, inputs or code have changed is done again, and its earlier folder is kept as NAME.before.

Ctrl-C, SIGTERM, SIGUSR1 or a file STOP in the pipeline's folder let the running stage save at its next step and end the
pipeline with exit status 75: the same command goes on from there. A second signal ends it at once.

Exit status: 0 done; 1 a stage failed; 2 something is refused; 75 stopped, to be continued; 130 ended at once.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("pipeline", help="run the stages of a pipeline recipe, or see where they stand")
    actions = parser.add_subparsers(title="actions", dest="action", required=True, parser_class=SettingsParser)
    running = actions.add_parser(
        "run",
        help="run all stages that are not finished",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_options(running)
    running.set_defaults(run=run)
    status = actions.add_parser("status", help="where every stage stands, and what a run would do", allow_abbrev=False)
    status.set_defaults(run=show_status)
    for each in (running, status):
        each.add_argument("recipe", type=recipe_path, metavar="RECIPE", help="the pipeline's YAML, or shipped:NAME")
        each.add_argument("overrides", nargs="*", metavar="STAGE.key=value", help="settings; also vars.key=value")
    status.add_argument("--any-code", action="store_true", help=ANY_CODE)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs stages one after the other."""
    parser.add_argument("--ranks", type=positive_int, help="processes (default: all GPUs, or 2 on a CPU)")
    parser.add_argument("--hostfile", type=home_path, help="machines to use over ssh, one 'HOST slots=N' a line")
    only = "run this one alone, by its name; may be given again"
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
    parser.add_argument("--no-doctor", action="store_true", help="do not check the machine first")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and exit")
    grace = "seconds that a stage which is asked to stop gets until it is ended (default %(default)s)"
    parser.add_argument("--grace", type=positive_int, default=600, metavar="SECONDS", help=grace)
    parser.add_argument("--any-code", action="store_true", help=ANY_CODE)


def run(options: argparse.Namespace) -> int:
    from launch.pipeline.recipe import load_pipeline
    from launch.pipeline.run import PipelineRun

    pipeline = load_pipeline(options.recipe, options.overrides)
    if options.dry_run:
        return show(pipeline, options.any_code)
    return PipelineRun(pipeline, run_settings(options, pipeline.output), console()).run()


def run_settings(options: argparse.Namespace, output: Path) -> "RunOptions":
    """What :func:`add_run_options` were given, for a pipeline in ``output``."""
    from launch.jobs.launcher import find_machine
    from launch.pipeline.run import RunOptions

    return RunOptions(
        machine=find_machine(options.ranks, options.hostfile, output / ".pipeline"),
        only=tuple(options.only),
        any_code=options.any_code,
        grace_seconds=options.grace,
        doctor=not options.no_doctor,
    )


def show_status(options: argparse.Namespace) -> int:
    from launch.pipeline.recipe import load_pipeline

    return show(load_pipeline(options.recipe, options.overrides), options.any_code)


def show(pipeline: "Pipeline", any_code: bool) -> int:
    """Print where every stage stands."""
    from launch.pipeline.status import status_table

    console().print(status_table(pipeline, any_code=any_code))
    return 0


def console() -> "Console":
    from rich.console import Console

    from launch.pipeline.overview import OutputThatMayEnd

    output: Any = OutputThatMayEnd(sys.stdout)  # a stream in all that a console does with it
    found = Console(highlight=False, file=output)
    if not found.is_terminal:
        found.width = max(found.width, 120)  # of the table in a log file
    return found
