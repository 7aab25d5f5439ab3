"""``rlhf data check FILES``: a report on preference data, without a model in memory."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rlhf.data.doctor import Examination

_EXAMPLES = 3
_DESCRIPTION = """\
Read preference data as training would, and report on it: rows, shapes, lengths, bad rows, exact and
contradictory duplicates, prompts shared by training and eval data, length bias. No model is loaded; with
--model, its tokenizer and chat template measure in tokens instead of characters.

Exit status: 0 if the data may be trained on; 1 if the training or the eval data has no usable pair, more
bad rows than --max-bad-share, or contradictory pairs above 1 %, or if eval prompts are also in the training
data; 2 if a source cannot be read at all.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``data`` and its one action ``check``."""
    from rlhf.data.options import ColumnConfig

    actions = subparsers.add_parser("data", help="look at preference data").add_subparsers(
        title="actions", dest="action", required=True
    )
    check = actions.add_parser(
        "check",
        help="report on preference data, without a model in memory",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "files", nargs="+", metavar="FILES", help="training data: files, folders, globs or hub names"
    )
    check.add_argument("--eval", nargs="+", metavar="FILES", default=[], help="evaluation data")
    check.add_argument("--split", default="train", help="split of hub datasets and of folders (train)")
    check.add_argument("--model", metavar="DIR", help="folder or hub name whose tokenizer measures lengths")
    check.add_argument("--template", help="as data.template in a recipe; with --model")
    check.add_argument(
        "--max-tokens", type=int, default=1024, help="limit of prompt plus response (1024); with --model"
    )
    check.add_argument(
        "--max-bad-share", type=float, default=0.01, help="bad rows that may be left out (0.01)"
    )
    check.add_argument(
        "--quarantine", metavar="FILE", type=Path, help="write the list of all bad rows here, as jsonl"
    )
    for field in dataclasses.fields(ColumnConfig):
        name = field.name.replace("_", "-")
        check.add_argument(
            f"--{name}-column", metavar="NAME", help=f"as data.columns.{field.name} in a recipe"
        )
    check.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        DataError: if a source or the template cannot be read.
        ModelError: if the tokenizer cannot be loaded.
    """
    from rich.console import Console

    from rlhf.core.files import write_text
    from rlhf.data.doctor import Ruler, examine, serious_faults
    from rlhf.data.options import ColumnConfig, SourceConfig

    names = (field.name for field in dataclasses.fields(ColumnConfig))
    columns = ColumnConfig(**{name: getattr(options, f"{name}_column") for name in names})
    ruler = Ruler(columns=columns, chat=_chat_format(options), max_tokens=options.max_tokens)
    groups = {
        "train": examine([SourceConfig(path=path, split=options.split) for path in options.files], ruler)
    }
    if options.eval:
        groups["eval"] = examine(
            [SourceConfig(path=path, split=options.split) for path in options.eval], ruler
        )
    console = Console(highlight=False)
    _print_report(console, groups, options)
    if options.quarantine:
        rows = [row for found in groups.values() for row in found.bad]
        write_text(options.quarantine, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
        console.print(f"{len(rows)} bad rows listed in {options.quarantine}", markup=False, soft_wrap=True)
    faults = serious_faults(groups["train"], groups.get("eval"), options.max_bad_share)
    for fault in faults:
        console.print(f"NOT FIT: {fault}", markup=False, soft_wrap=True)
    if not faults:
        console.print("Fit to train on.")
    return 1 if faults else 0


def _chat_format(options: argparse.Namespace) -> Any:
    if options.model is None:
        return None
    from rlhf.core.errors import ModelError
    from rlhf.train.chat import load_chat

    if options.model.startswith((".", "/", "~")) and not Path(options.model).expanduser().is_dir():
        raise ModelError(f"--model {options.model}: there is no such folder")
    return load_chat(Path(options.model).expanduser(), options.template)


def _print_report(console: "Console", groups: "dict[str, Examination]", options: argparse.Namespace) -> None:
    for role, found in groups.items():
        for line in _source_lines(role, found):
            console.print(line, markup=False, soft_wrap=True)
    console.print(_rows_table(groups), _lengths_table(groups), _checks_table(groups, options))
    for role, found in groups.items():
        for line in _examples(role, found):
            console.print(line, markup=False, soft_wrap=True)
    for role, found in groups.items():
        if found.bad:
            console.print(_bad_table(role, found))


def _table(title: str, *headings: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="left" if number == 0 else "right")
    return table


def _source_lines(role: str, found: "Examination") -> list[str]:
    shapes = ", ".join(f"{count} x {shape}" for shape, count in found.shapes.items())
    return [*(f"{role}: {name}" for name in found.names), f"  shapes of rows: {shapes or 'none usable'}"]


def _rows_table(groups: "dict[str, Examination]") -> "Table":
    table = _table("Rows", "", "rows", "bad", "pairs", "prompts", "with scores", "with margin")
    for role, found in groups.items():
        counts = (
            found.rows,
            len(found.bad),
            found.usable,
            len(found.prompts),
            found.with_scores,
            found.with_margin,
        )
        table.add_row(role, *map(str, counts))
    return table


def _lengths_table(groups: "dict[str, Examination]") -> "Table":
    unit = groups["train"].unit
    table = _table(f"Lengths in {unit}", "", "median", "95 %", "99 %", "longest")
    for role, found in groups.items():
        for part, values in found.quantiles().items():
            table.add_row(f"{role}: {part}", *map(str, values))
    return table


def _checks_table(groups: "dict[str, Examination]", options: argparse.Namespace) -> "Table":
    from rlhf.data.doctor import shared_prompts

    table = _table("Checks", "", *groups)
    columns = [_checks(found, options) for found in groups.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    if "eval" in groups:
        prompts, pairs = shared_prompts(groups["train"], groups["eval"])
        table.add_row("prompts also in the training data", "", f"{prompts} ({pairs} pairs)")
    return table


def _checks(found: "Examination", options: argparse.Namespace) -> dict[str, str]:
    from rlhf.core.intervals import wilson_interval

    wins, differing = found.longer_wins()
    low, high = wilson_interval(wins, differing)
    checks = {
        "pairs that repeat an earlier one": str(sum(len(rows) - 1 for rows in found.duplicates())),
        "pairs that stand both ways round": str(len(found.contradictions())),
        "chosen has the lower score": str(len(found.against_scores)),
        "the longer answer wins": f"{wins / max(differing, 1):.1%} ({low:.1%}-{high:.1%})",
    }
    if options.model:
        share = found.cut / max(found.usable, 1)
        checks[f"longer than {options.max_tokens} tokens"] = f"{found.cut} ({share:.1%})"
        checks["of these, by the response alone"] = str(found.too_long)
    return checks


def _examples(role: str, found: "Examination") -> list[str]:
    repeated = [" = ".join(rows[:2]) for rows in found.duplicates()]
    contradictory = [f"{one[0]} against {other[0]}" for one, other in found.contradictions()]
    kinds = {"repeated": repeated, "both ways round": contradictory, "lower score": found.against_scores}
    return [f"{role}, {kind}: {'; '.join(rows[:_EXAMPLES])}" for kind, rows in kinds.items() if rows]


def _bad_table(role: str, found: "Examination") -> "Table":
    from rich.markup import escape

    from rlhf.data.doctor import reasons

    table = _table(f"Bad rows of {role}", "reason", "rows", "first examples")
    for reason, rows in reasons(found.bad).items():
        examples = "\n".join(f"{row.row_id}: {row.detail}" for row in rows[:_EXAMPLES])
        table.add_row(reason, str(len(rows)), escape(examples))
    table.columns[-1].justify = "left"
    return table
