"""``rlhf pipeline``: all stages of a recipe, each after those that it needs: started, continued or skipped."""

import argparse
from typing import TYPE_CHECKING

from launch.commands.arguments import Subparsers, add_machine, add_parallel, add_settings, command, group, positive_int
from launch.commands.report import end_with_report
from launch.screen import console
from rlhf.core.errors import UserError
from rlhf.core.paths import recipe_path

if TYPE_CHECKING:
    from launch.pipeline.recipe import Pipeline
    from launch.pipeline.run import RunOptions

_DESCRIPTION = """\
Run the stages of a pipeline recipe, each as a job of its own after those that it needs. Stages that do not need each
other run side by side where there are devices for both: by what their recipe asks for (nodes, ranks), or with
--parallel N, which gives each an N-th. A stage that fails stops nothing that does not need it. A stage
that is finished with the same settings, inputs, code and libraries is skipped; one that was begun goes on from its
checkpoint, also where only code or libraries have changed; any other change does it again, and its earlier folder is
kept as NAME.before. Work of more than ten minutes is done again only if --redo names it. Settings of the command line
are remembered in the pipeline's folder.

Ctrl-C, SIGTERM, SIGUSR1 or a file STOP in the pipeline's folder let the stages at work save at their next step and end
the pipeline with exit status 75: the same command goes on from there. A second signal ends them at once.

Exit status: 0 done; 1 a stage failed; 2 something is refused; 75 stopped, to be continued; 130 ended at once.
"""


def add_parser(subparsers: Subparsers) -> None:
    actions = group(subparsers, "pipeline", help="run the stages of a pipeline recipe, or see where they stand")
    running = command(actions, "run", run, help="run all stages that are not finished", description=_DESCRIPTION)
    add_run_options(running)
    where = "where every stage stands, and what a run would do"
    status = command(actions, "status", show_status, help=where)
    add_any_code(status)
    for each in (running, status):
        each.add_argument("recipe", type=recipe_path, metavar="RECIPE", help="the pipeline's YAML, or shipped:NAME")
        add_settings(each, "settings; also vars.key=value", "STAGE.key=value")
        add_forget(each)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs stages."""
    add_machine(parser)
    add_parallel(parser)
    only = "run this one alone, by its name; may be given again; other calls may run other stages meanwhile"
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
    parser.add_argument("--no-doctor", action="store_true", help="do not check the machine first")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done and what is missing, and exit")
    grace = "seconds that a stage which is asked to stop gets until it is ended (default %(default)s)"
    parser.add_argument("--grace", type=positive_int, default=600, metavar="SECONDS", help=grace)
    add_any_code(parser)
    redo = "do this one again, and what builds on it; may be given again"
    parser.add_argument("--redo", action="append", default=[], metavar="NAME", help=redo)


def add_forget(parser: argparse.ArgumentParser) -> None:
    forget = "leave out the settings that earlier calls gave on the command line"
    parser.add_argument("--forget", action="store_true", help=forget)


def add_any_code(parser: argparse.ArgumentParser) -> None:
    any_code = "results of another version of the code and of the libraries count, too"
    parser.add_argument("--any-code", action="store_true", help=any_code)


def run(options: argparse.Namespace) -> int:
    from launch.pipeline.run import PipelineRun
    from launch.pipeline.state import load_remembering

    pipeline = load_remembering(options.recipe, options.overrides, forget=options.forget)
    if options.dry_run:
        return dry_run(pipeline, options)
    screen = console()
    code = PipelineRun(pipeline, run_settings(options), screen).run()
    end_with_report(screen, pipeline.output)
    return code


def run_settings(options: argparse.Namespace) -> "RunOptions":
    """What :func:`add_run_options` were given."""
    from launch.jobs.launcher import find_machine
    from launch.pipeline.run import RunOptions

    return RunOptions(
        machine=find_machine(options.ranks, options.hostfile),
        at_once=options.parallel,
        only=tuple(options.only),
        any_code=options.any_code,
        redo=tuple(options.redo),
        grace_seconds=options.grace,
        doctor=not options.no_doctor,
    )


def show_status(options: argparse.Namespace) -> int:
    from launch.pipeline.overview import status_table
    from launch.pipeline.state import Progress, load_remembering

    pipeline = load_remembering(options.recipe, options.overrides, forget=options.forget)
    console().print(status_table(pipeline, Progress(pipeline, any_code=options.any_code, writes=False)))
    return 0


def dry_run(pipeline: "Pipeline", options: argparse.Namespace) -> int:
    """Print what a run would do.

    Raises:
        UserError: if something is not there that a stage would read and none makes.
    """
    from launch.doctor import Subject
    from launch.doctor.inputs import inputs
    from launch.pipeline.overview import status_table
    from launch.pipeline.state import Action, Progress

    progress = Progress(pipeline, any_code=options.any_code, redo=options.redo, writes=False)
    console().print(status_table(pipeline, progress))
    chosen = [pipeline.named(name) for name in options.only] or pipeline.stages
    ahead = tuple(stage for stage in chosen if progress.decide(stage).action is not Action.SKIP)
    found = [] if options.no_doctor else inputs(Subject(output=pipeline.output, stages=ahead, pipeline=pipeline))
    missing = [f"{each.text}; {each.remedy}" for each in found if each.status == "failure"]
    if missing:
        raise UserError("\n".join(missing))
    return 0
