"""``rlhf sweep``: the same training with different settings, one run after the other, and a comparison."""

import argparse
from pathlib import Path

from launch.commands.arguments import Subparsers, add_recipes, add_settings, command, group
from launch.commands.pipeline import add_forget, add_run_options, dry_run, run_settings
from launch.commands.report import end_with_report
from launch.screen import console
from launch.stages import STAGES, training
from rlhf.core.paths import home_path

FOLDER = Path("runs/sweep")
_DESCRIPTION = """\
Train once for every combination of the settings that are given several values (key=a,b,c), and compare the runs on
held-out data. A comma inside of brackets, braces or quotes separates no values;
loss.kind=all takes every objective of the preference stage that reads pairs. All runs are checked before the first one
starts.

A sweep is a pipeline with one entry for each run: runs that are finished with the same settings, data and code are
skipped, one that was begun goes on from its checkpoint, and it is stopped and watched like one. A call that gives no
setting several values goes on with those of the call before. It leaves sweep.md, sweep.json and sweep.png in its
folder, one run folder for each run, and what they printed in logs/.

Exit status: 0 done; 1 a run failed; 2 something is refused; 75 stopped, to be continued; 130 ended at once.
"""


def add_parser(subparsers: Subparsers) -> None:
    stages = group(subparsers, "sweep", help="train with several objectives or settings, and compare", of="stage")
    for name in training():
        stage = command(stages, name, run, help=f"the {name} stage", description=_DESCRIPTION)
        add_recipes(stage)
        place = f"(default: {FOLDER}/ and the recipe's name)"
        stage.add_argument("--output", metavar="FOLDER", type=home_path, help=place)
        add_run_options(stage)
        add_forget(stage)
        add_settings(stage, "settings; key=a,b,c tries each")


def run(options: argparse.Namespace) -> int:
    from launch.pipeline.run import PipelineRun
    from launch.pipeline.sweep import plan_remembering
    from launch.pipeline.sweep_report import comparison_table, report_of, write_report

    folder = options.output or FOLDER / options.config[-1].stem
    stage = STAGES[options.stage]
    sweep = plan_remembering(stage, options.config, options.overrides, folder, forget=options.forget)
    if options.dry_run:
        return dry_run(sweep.pipeline, options)
    screen = console()
    training_runs = PipelineRun(sweep.pipeline, run_settings(options), screen)
    try:
        code = training_runs.run()
        end_with_report(screen, folder)
        return code
    finally:  # also where a run cannot be started: those before it are finished
        report = report_of(sweep, any_code=options.any_code)
        if folder.is_dir():
            write_report(folder, report, training_runs.failures)
        if report.results:
            screen.print(comparison_table(report))
            screen.print(*report.notes, sep="\n", markup=False)
            screen.print(f"written: {folder}/sweep.md, sweep.json, sweep.png", soft_wrap=True, markup=False)
