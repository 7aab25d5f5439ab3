"""``rlhf capsule RUN``: a run in one small file, from which ``rlhf reproduce`` makes it again."""

import argparse

from launch.commands.arguments import Subparsers, command
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

_DESCRIPTION = """\
Write one small JSON file about the run of a stage: its recipe, versions, digests of data and code, metrics, evaluation
and some samples. rlhf reproduce FILE runs it again and says whether it came to the same.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = command(subparsers, "capsule", run, help="put a run into one small file", description=_DESCRIPTION)
    parser.add_argument("run_folder", metavar="RUN", type=home_path, help="output folder of a stage that trains")
    place = "(default: RUN/capsule.json)"
    parser.add_argument("-o", "--output", type=home_path, metavar="FILE", help=place)


def run(options: argparse.Namespace) -> int:
    """Write the capsule.

    Raises:
        UserError: if there is no such run, or the output is a folder.
    """
    from launch.capsule.capsule import capsule_of, write_capsule

    output = options.output or options.run_folder / "capsule.json"
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; expected a file")
    write_capsule(output, capsule_of(options.run_folder))
    print(f"capsule: {output} ({output.stat().st_size / 1024:.0f} KiB)")
    return 0
