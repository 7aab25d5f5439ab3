"""``rlhf report RUN [RUN ...] -o report.html``: one page that shows what runs came to."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands.arguments import Subparsers, command
from launch.screen import console
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

if TYPE_CHECKING:
    from rich.console import Console

    from launch.report.page import Report

PAGE = "report.html"
PORT = 8642
_DESCRIPTION = """\
Write one self-contained HTML page about a run, or about several of them side by side: what was run, curves, margins,
calibration and length bias, drift, the frontier of reward against KL, samples before and after, benchmarks, warnings
and what to change, time and memory. RUN is the output folder of a stage, a pipeline, a sweep or a study. The page needs
no network; with the extra "report" (Plotly) its figures can be zoomed. The terminal shows the summary in short.

--serve shows runs that are still going, to browsers of this machine alone; the page loads itself anew when there is
something new.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = command(subparsers, "report", run, help="a page that shows what runs came to", description=_DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=home_path, help="output folder of a stage or a pipeline")
    place = f"(default: {PAGE} in the folder of the first run)"
    parser.add_argument("-o", "--output", type=home_path, metavar="FILE", help=place)
    plain = "figures as SVG alone, also where Plotly is installed: a small page"
    parser.add_argument("--plain", action="store_true", help=plain)
    plan = "do not work out what rlhf plan foretells of memory: some seconds less"
    parser.add_argument("--no-plan", dest="plan", action="store_false", help=plan)
    parser.add_argument("--serve", action="store_true", help="show runs that are still going, on this machine alone")
    port = "of --serve (default %(default)s; 0 takes a free one)"
    parser.add_argument("--port", type=_port, default=PORT, help=port)


def _port(text: str) -> int:
    if not 0 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to {2**16 - 1}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Write the page, or serve it.

    Raises:
        UserError: if there is no run, runs cannot be compared, or the output is a folder.
    """
    if options.serve:
        return _serve(options.runs, options.port, interactive=not options.plain)
    from launch.report.page import report_of, write_report
    from launch.report.planned import planned_bytes

    output = options.output or options.runs[0] / PAGE
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; expected a file, such as {output / PAGE}")
    planned = planned_bytes(options.runs) if options.plan else {}
    report = report_of(options.runs, planned=planned)
    try:
        write_report(output, report, interactive=not options.plain)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    screen = console()
    show(screen, report)
    say_where(screen, output)
    return 0


def show(screen: "Console", report: "Report") -> None:
    """The summary in short."""
    for line in report.lines():
        screen.print(line, soft_wrap=True, markup=False, highlight=False)


def say_where(screen: "Console", page: Path) -> None:
    screen.print(f"report: {page}", soft_wrap=True, markup=False, highlight=False)


def end_with_report(screen: "Console", folder: Path) -> None:
    """Write the page of all that is in ``folder``, if it shows anything new, and say where.

    What goes wrong with it is said and no more: the work is done, whatever becomes of its picture.
    """
    from launch.report.page import is_current, report_of, write_report

    page = folder / PAGE
    try:
        report = report_of([folder])
        if not is_current(page, report):
            write_report(page, report)
    except Exception as error:
        said = str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"
        screen.print(f"no report: {said}", soft_wrap=True, markup=False, highlight=False)
    else:
        say_where(screen, page)


def _serve(folders: Sequence[Path], port: int, *, interactive: bool) -> int:
    from launch.report.serve import server_of

    with server_of(folders, port, interactive=interactive) as server:
        host, chosen = server.server_address[:2]
        print(f"http://{host!s}:{chosen}/ (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
