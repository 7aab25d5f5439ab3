"""``rlhf sweep``: the same training with different settings, one run after the other, and a comparison."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.arguments import SettingsParser
from launch.jobs import log
from launch.jobs.devices import default_ranks
from launch.jobs.launcher import launcher, run_logged
from rlhf.core.clock import clock

if TYPE_CHECKING:
    from rich.console import Console

    from launch.pipeline.sweep import SweepRun

FOLDER = Path("runs/sweep")
_DESCRIPTION = """\
Train once for every combination of the settings that are given several values (key=a,b,c), under the deepspeed
launcher, and compare the runs on held-out data. A comma inside of brackets, braces or quotes separates no values.
loss.kind=all takes every objective that reads pairs. All runs are checked before the first one starts.

Started again, the sweep skips the runs that finished with the same settings and goes on with the others where they
stopped. It leaves sweep.md, sweep.json and sweep.png in its folder, and one run folder with a log.txt for each run.

Exit status: 0 if all runs finished; 1 if some failed; 2 if the settings are refused.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("sweep", help="train with several objectives or settings, and compare")
    stages = parser.add_subparsers(title="stages", dest="stage", required=True, parser_class=SettingsParser)
    preference = stages.add_parser(
        "preference",
        help="the preference stage",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    several = "a recipe of the stage; may be given again, later ones win"
    preference.add_argument("--config", metavar="RECIPE", type=Path, action="append", required=True, help=several)
    preference.add_argument("--output", metavar="FOLDER", type=Path, help=f"(default: {FOLDER}/ and the recipe's name)")
    ranks = "processes of each run (default: all GPUs, or 2 on a CPU with 2 or more cores)"
    preference.add_argument("--ranks", type=int, help=ranks)
    preference.add_argument("overrides", nargs="*", metavar="key=value", help="settings; key=a,b,c tries each")
    preference.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from launch.pipeline.sweep import plan_sweep
    from launch.pipeline.sweep_report import NOTES, comparison_table, results_of, write_report

    folder = options.output or FOLDER / options.config[-1].stem
    runs = plan_sweep(options.config, options.overrides, folder)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # of the table in a log file
    failures = _train_all(runs, options.ranks or default_ranks(), console)
    results = results_of(runs)
    write_report(folder, results, failures)
    if results:
        console.print(comparison_table(results), *NOTES, sep="\n")
        console.print(f"written: {folder}/sweep.md, sweep.json, sweep.png", soft_wrap=True)
    if failures:
        console.print(f"{len(failures)} of {len(runs)} runs failed:", soft_wrap=True)
    for name, reason in failures.items():
        console.print(f"  {name}: {reason}", soft_wrap=True)
    return 1 if failures else 0


def _train_all(runs: Sequence["SweepRun"], ranks: int, console: "Console") -> dict[str, str]:
    """Run what is not finished; why runs failed, by their names."""
    failures: dict[str, str] = {}
    for number, each in enumerate(runs, start=1):
        head = f"{number} of {len(runs)}  {each.name}"
        if each.is_done:
            console.print(f"{head}  finished before", soft_wrap=True)
            continue
        began = time.monotonic()
        reason = _train(each, ranks, head, console)
        if reason is not None:
            failures[each.name] = reason
        outcome = "done" if reason is None else "failed"
        console.print(f"{head}  {outcome} after {clock(time.monotonic() - began)}", soft_wrap=True)
    return failures


def _train(run: "SweepRun", ranks: int, head: str, console: "Console") -> str | None:
    """Train to the end, from the newest checkpoint if there is one; why that failed, or ``None``."""
    from rlhf.core.files import write_json

    began, earlier = time.monotonic(), _written_at(run.evaluation)
    log_start = log.size(run.log)
    run.marker.unlink(missing_ok=True)
    command = [*launcher(ranks), "--module", "policy.preference", *run.arguments]
    with _live_line(console, head, run.log) as show:

        def tick() -> None:
            where = log.progress_line(run.log, log_start) or "starting"
            show(f"{where}  {clock(time.monotonic() - began)}")

        code = run_logged(command, run.log, tick)
    # The deepspeed command can exit 0 although a rank was killed; a finished run has written its evaluation.
    if code == 0 and _written_at(run.evaluation) != earlier:
        write_json(run.marker, {"digest": run.digest})
        return None
    return f"exit code {code}: {log.last_line(run.log, log_start) or 'no output'} ({run.log})"


@contextlib.contextmanager
def _live_line(console: "Console", head: str, log: Path) -> Iterator[Callable[[str], Any]]:
    """A line that is written over in a terminal; elsewhere one that says where to look."""
    if not console.is_terminal:
        console.print(f"{head}  started, see {log}", soft_wrap=True)
        yield lambda text: None
        return
    from rich.text import Text

    with console.status(Text(f"{head}  starting"), refresh_per_second=2) as status:
        yield lambda text: status.update(Text(f"{head}  {text}"))


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None

