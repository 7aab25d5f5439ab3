"""``rlhf data audit PAIRS --model MODEL -o FOLDER``: which labels of preference pairs look wrong."""

import argparse

from launch.commands.arguments import Subparsers, add_columns, chosen, command, given_columns, positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

COLUMNS = ("prompt", "chosen", "rejected", "system", "input", "better", "strength", "answers")
_DESCRIPTION = """\
Judge the label of every pair by small reward heads that did not see it. The answers become frozen features of
--model (kept on disk: a second audit of the same pairs takes seconds on a CPU), pairs are dealt out to folds, a
head is fitted to all folds but one and judges that one, several times over. A mixture fitted to these margins says
how many labels are wrong, and how likely each is.

Written to the folder: pairs.jsonl, the data with the columns audit_margin, audit_margin_sd, audit_wrong,
audit_weight, audit_label and audit_pair; suspects.jsonl, the most suspect pair first, with its texts;
summary.json, the share of wrong labels with its interval, also by source and annotator; report.html, all of it to
look at.
"""


def add_parser(actions: Subparsers) -> None:
    about = "find labels of preference pairs that look wrong"
    parser = command(actions, "audit", run, help=about, description=_DESCRIPTION)
    parser.add_argument("data", metavar="PAIRS", help="preference pairs: a file, folder, glob or hub name")
    parser.add_argument("--model", help="folder or hub name of the backbone whose states are read")
    judge = "a recipe of the reward stage (with model.lora, say) whose runs judge, one for each fold and repeat"
    parser.add_argument("--judge", type=home_path, metavar="RECIPE", help=judge)
    on_top = "settings on top of it, such as model.path=FOLDER train.epochs=2"
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[], help=on_top, dest="settings")
    parser.add_argument("-o", "--output", type=home_path, required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--split", help="split of a hub dataset or of a folder (train)")
    parser.add_argument("--template", help="as data.template in a recipe")
    layer = "read the states after this layer (default: two fifths of the way up)"
    parser.add_argument("--layer", type=positive_int, help=layer)
    unseen = "heads judge pairs that they did not see, or prompts of which they saw no pair (default %(default)s)"
    parser.add_argument("--unseen", choices=["pairs", "prompts"], default="pairs", help=unseen)
    parser.add_argument("--folds", type=_several, default=5, help="parts of the pairs (default %(default)s)")
    repeats = "times that they are dealt out anew (default 4, with --judge 1)"
    parser.add_argument("--repeats", type=positive_int, help=repeats)
    longest = "tokens of prompt and answer that are read; longer ones lose their beginning (default %(default)s)"
    parser.add_argument("--max-tokens", type=positive_int, default=1024, help=longest)
    at_once = "padded tokens at once (default %(default)s)"
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help=at_once)
    dtype = "of the backbone; auto: bfloat16 on a GPU that has it, else float32"
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help=dtype)
    groups = "columns by whose values the share is estimated as well (default: source annotator)"
    parser.add_argument("--by", nargs="+", metavar="COLUMN", default=["source", "annotator"], help=groups)
    parser.add_argument("--cache-dir", type=home_path, metavar="DIR", help="where features are kept")
    parser.add_argument("--seed", type=int, default=0, help="of folds, heads and resampling (default %(default)s)")
    add_columns(parser, COLUMNS)


def run(options: argparse.Namespace) -> int:
    """Audit, and print the verdict.

    Raises:
        UserError: if the output is no folder, or the audit cannot be made.
    """
    from launch.commands.report import end_with_report
    from launch.screen import console
    from reward.audit.run import AuditOptions, audit_file
    from rlhf.data.options import ColumnConfig

    if (options.model is None) == (options.judge is None):
        raise UserError("give either --model (whose frozen states are read) or --judge (a recipe of the reward stage)")
    if options.settings and options.judge is None:
        raise UserError("--set is for the recipe of --judge")
    if options.judge is not None and not options.judge.is_file():
        raise UserError(f"--judge {options.judge}: no such file; expected a recipe of the reward stage")
    if options.repeats is None:
        options.repeats = 1 if options.judge else 4
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output}: a file; an audit writes a folder")
    own = ("data", "model", "output", "split", "template", "layer", "unseen", "folds", "repeats", "max_tokens")
    more = ("batch_tokens", "dtype", "cache_dir", "seed", "judge")
    columns = ColumnConfig(**given_columns(options, COLUMNS))
    given = {"settings": tuple(options.settings), **chosen(options, own + more)}
    print(audit_file(AuditOptions(columns=columns, group_columns=tuple(options.by), **given)))
    print(f"{options.output}: pairs.jsonl, suspects.jsonl, summary.json")
    end_with_report(console(), options.output)
    return 0


def _several(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 2")
    return value
