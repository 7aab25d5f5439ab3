"""``rlhf study``: variants of a stage with several seeds each, and a verdict for every comparison."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands.arguments import Subparsers, add_settings, command
from launch.commands.pipeline import add_run_options, dry_run, run_settings
from launch.commands.report import end_with_report
from launch.screen import console
from rlhf.core.errors import UserError
from rlhf.core.paths import recipe_path

if TYPE_CHECKING:
    from rich.console import Console

    from launch.study.results import Results
    from launch.study.tidy import TidyStudy

_DESCRIPTION = """\
Train every variant once with every seed, as a pipeline with an entry for each run, and compare each variant with the
baseline on the same held-out items: paired differences, with an interval that counts chance among seeds and among
prompts, and one line that says better, worse, or undecided with what would decide it.

Runs that are finished with the same settings, data and code are skipped; one that was begun goes on. Written to the
study's folder: results.csv (one row an item and run), study.json, study.md, and report.html with curves and bands. A
study whose YAML has results: compares what such a file of another program holds.

Exit status: 0 done; 1 a run failed; 2 something is refused; 75 stopped, to be continued; 130 ended at once.
"""


def add_parser(subparsers: Subparsers) -> None:
    about = "variants of a stage with several seeds each, and a verdict"
    parser = command(subparsers, "study", run, help=about, description=_DESCRIPTION)
    parser.add_argument("--config", metavar="STUDY", type=recipe_path, required=True, help="the study's YAML")
    add_run_options(parser)
    add_settings(parser, "settings of the study, such as seeds=[0,1]; they win over its file")


def run(options: argparse.Namespace) -> int:
    from launch.study.tidy import TidyStudy, read_study

    study = read_study(options.config, options.overrides)
    if isinstance(study, TidyStudy):
        return _compare(study, options)
    from launch.pipeline.run import PipelineRun
    from launch.study.results import results_of

    if options.dry_run:
        return dry_run(study.pipeline, options)
    screen = console()
    runs = PipelineRun(study.pipeline, run_settings(options), screen)
    code = runs.run()
    _conclude(screen, study.config.output, results_of(study, any_code=options.any_code), runs.failures)
    return code


def _compare(study: "TidyStudy", options: argparse.Namespace) -> int:
    from launch.study.tidy import make_results, read_tidy

    given = ["--redo"] * bool(options.redo) + ["--only"] * bool(options.only) + ["--any-code"] * options.any_code
    if given:
        raise UserError(
            f"{', '.join(given)}: {options.config} has results = {study.results}, whose runs its own program makes: "
            "nothing here tells them apart; remove the file, or rows of it, to have them made again"
        )
    screen = console()
    if options.dry_run:
        making = " ".join(study.command) or "nothing: it is there"
        screen.print(f"results: {study.results}, made by {making}", soft_wrap=True, markup=False, highlight=False)
        return 0
    make_results(study)
    _conclude(screen, study.output, read_tidy(study, options.config.stem), {})
    return 0


def _conclude(screen: "Console", folder: Path, results: "Results", failures: Mapping[str, str]) -> None:
    """Write the files, and show table and verdicts."""
    from launch.screen import titled_table
    from launch.study.results import headings_and_rows, write_results

    write_results(folder, results, failures)
    headings, rows = headings_and_rows(results)
    table = titled_table(f"Held-out {results.measure.item}", *headings)
    for row in rows:
        table.add_row(*row)
    screen.print(table)
    for each in results.compared:
        screen.print(each.verdict, soft_wrap=True, markup=False, highlight=False)
    screen.print(f"written: {folder}/results.csv, study.json, study.md", soft_wrap=True, markup=False)
    end_with_report(screen, folder)
