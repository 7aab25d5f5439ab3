"""``rlhf prune FOLDER``: what no run needs any more, and how much room it takes."""

import argparse
from collections.abc import Sequence

from launch.commands.arguments import Subparsers, command
from launch.pruning import KINDS, Needless, find_needless
from launch.screen import console, gib, titled_table
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

_DESCRIPTION = """\
Show what no run in FOLDER needs any more, and remove it if asked to. FOLDER is that of a run, of a pipeline, or one
that holds several. Where a run is at work nothing is touched. Published models, metrics and reports always stay.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = command(subparsers, "prune", run, help="free the room that no run needs", description=_DESCRIPTION)
    parser.add_argument("folder", metavar="FOLDER", type=home_path, help="a run, a pipeline, or a folder of such")
    parser.add_argument("--delete", action="store_true", help="remove what is shown")
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in KINDS.items())
    parser.add_argument("--keep", choices=KINDS, action="append", default=[], help=f"leave these alone. {kinds}")


def run(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no folder; give the output of a run or of a pipeline")
    found = find_needless(options.folder, [kind for kind in KINDS if kind not in options.keep])
    if not found:
        print(f"{options.folder}: nothing that no run needs")
        return 0
    _show(found)
    if not options.delete:
        print("nothing was removed; the same command with --delete removes them")
        return 0
    for each in found:
        each.remove()
    left = [each for each in found if each.path.exists()]
    print(f"removed {len(found) - len(left)} of {len(found)}")
    if left:
        raise UserError(f"{left[0].path}: cannot be removed; mend its rights")
    return 0


def _show(found: Sequence[Needless]) -> None:
    table = titled_table("Not needed by any run", "what", "kind", "size")
    for each in found:
        table.add_row(str(each.path), each.kind, gib(each.size))
    table.add_section()
    table.add_row("together", "", gib(sum(each.size for each in found)))
    console().print(table)
