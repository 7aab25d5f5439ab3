"""``rlhf score``: rewards of texts or pairs from a published reward model."""

import argparse

from launch.commands.arguments import Subparsers, add_columns, chosen, command, given_columns, positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

COLUMNS = ("prompt", "response", "chosen", "rejected", "system", "input", "group")
_DESCRIPTION = """\
Write one JSON line per row: reward, or chosen_reward, rejected_reward and reward_margin, the first minus the second.
Started again with the same output, it goes on where it stopped.
"""


def add_parser(subparsers: Subparsers) -> None:
    about = "score prompts with responses, or pairs, with a published reward model"
    parser = command(subparsers, "score", run, help=about, description=_DESCRIPTION)
    parser.add_argument("--model", type=home_path, required=True, help="final/ folder of a reward run")
    parser.add_argument("--data", required=True, help="jsonl, json, csv, parquet, arrow, or a hub name")
    parser.add_argument("--output", type=home_path, required=True, help="jsonl file to write")
    at_once = "padded tokens at once (default %(default)s)"
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help=at_once)
    parser.add_argument("--max-tokens", type=positive_int, help="rows longer than this are reported, not scored")
    kept = "write the row's own columns, too, as data with the margin of a reward model (data.columns.margin)"
    parser.add_argument("--keep-rows", action="store_true", help=kept)
    parser.add_argument("--split", help="split of a hub dataset or of a folder (train)")
    add_columns(parser, COLUMNS)


def run(options: argparse.Namespace) -> int:
    from reward.score import ScoreOptions, score_file
    from rlhf.data.options import ColumnConfig

    if not options.model.is_dir():
        raise UserError(f"--model {options.model}: no such folder; give the final/ folder of a reward run")
    own = chosen(options, ("model", "data", "output", "batch_tokens", "max_tokens", "split", "keep_rows"))
    faults = score_file(ScoreOptions(columns=ColumnConfig(**given_columns(options, COLUMNS)), **own))
    print(f"{options.output}: done" + (f"; {faults} rows could not be scored, see their 'error'" if faults else ""))
    return 1 if faults else 0
