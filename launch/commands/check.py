"""``rlhf check``: is what was set up what it should be?"""

import argparse

from launch.commands.arguments import Subparsers, command, group, positive_int, share
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

_SERVED = """\
Asks a server of a reward model for the scores of sample rows in every form it takes (messages, texts, token ids, pairs,
one by one and together), and compares them with those of plain Transformers in float32. One verdict line; status 1 if
a score is off, or the server serves another model. For rlhf serve reward, and for vLLM started by hand.
"""


def add_parser(subparsers: Subparsers) -> None:
    kinds = group(subparsers, "check", help="compare what was set up with what it should be", of="what")
    about = "compare the scores of a reward server with those of plain Transformers"
    parser = command(kinds, "served", run_served, help=about, description=_SERVED)
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", metavar="DIR", type=home_path, required=True, help="the folder that it should serve")
    parser.add_argument("--data", help="file of texts or pairs to compare besides made-up ones")
    parser.add_argument("--rows", type=positive_int, default=64, help="texts of --data (default %(default)s)")
    off = "share of the deviation of rewards that a score may be off (default %(default)s; in bfloat16 0.1)"
    parser.add_argument("--tolerance", type=share, default=0.01, help=off)


def run_served(options: argparse.Namespace) -> int:
    from rich.console import Console

    from reward.serving.check import check_served, verdict_line, verdict_table

    if not options.model.is_dir():
        raise UserError(f"--model {options.model}: no such folder; give the final/ folder of a reward run")
    verdict = check_served(options.url, options.model, data=options.data, rows=options.rows, share=options.tolerance)
    Console().print(verdict_table(verdict))
    print(verdict_line(verdict, options.url, options.model))
    return 0 if verdict.passed else 1
