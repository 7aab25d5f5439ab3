"""``rlhf data check FILES``: a report on data of any kind, without a model in memory."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands import data_audit
from launch.commands.arguments import Subparsers, add_columns, command, given_columns, group, positive_int
from launch.screen import titled_table
from rlhf.core.paths import home_path

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rlhf.data.doctor import Examination

_EXAMPLES = 3
_DESCRIPTION = """\
Read data as training would, and report on it: rows, shapes, columns that are not read, lengths, bad rows, exact
and contradictory duplicates, scores that contradict the pairs, markup, prompts shared by training and eval data,
length bias. No model is loaded; with --model, its tokenizer and chat template measure in tokens instead of
characters, and tell what the template leaves out.

Settings are those of a recipe: data.columns.prompt=question, data.template=chatml.

Exit status: 0 if the data may be trained on; 1 if the training or the eval data has nothing usable, more bad rows
than --max-bad-share, contradictory items above 1 %, scores against more than 10 % of the pairs, or if eval prompts
are also in the training data; 2 if a source cannot be read at all.
"""
_ALIASES = {"sft": "conversations", "unpaired": "labeled", "labelled": "labeled"}
_KINDS = {"conversation": "conversations", "unpaired": "labeled"}
"""What stages call their rows, where it is another name."""


def add_parser(subparsers: Subparsers) -> None:
    actions = group(subparsers, "data", help="look at data")
    data_audit.add_parser(actions)
    check = command(actions, "check", run, help="report on data, without a model in memory", description=_DESCRIPTION)
    files = "training data: files, folders, globs or hub names; also settings, such as data.columns.prompt=question"
    check.add_argument("files", nargs="*", metavar="FILES", help=files)
    recipe = (
        "a recipe, in place of FILES: its data, with the columns, template and limits that it sets, measured by the "
        "tokenizer of its model; settings such as data.max_tokens=512 change it"
    )
    check.add_argument("--config", metavar="RECIPE", action="append", default=[], help=recipe)
    stages = ["sft", "reward", "preference", "ppo"]
    check.add_argument("--stage", choices=stages, help="of --config, if it is not clear")
    kind = (
        "what rows are: preference pairs (reward models, DPO), conversations (SFT), prompts (PPO) or answers with a "
        "label (KTO); default: as the columns of the first row suggest"
    )
    check.add_argument("--kind", choices=["pairs", "conversations", "prompts", "labeled", *_ALIASES], help=kind)
    check.add_argument("--eval", nargs="+", metavar="FILES", default=[], help="evaluation data")
    check.add_argument("--split", help="split of hub datasets and of folders (train)")
    check.add_argument("--model", metavar="DIR", help="folder or hub name whose tokenizer measures lengths")
    check.add_argument("--template", help="as data.template in a recipe; with --model")
    limit = "limit of prompt plus response (1024; prompts: 512); with --model"
    check.add_argument("--max-tokens", type=positive_int, help=limit)
    check.add_argument("--max-bad-share", type=float, default=0.01, help="bad rows that may be left out (0.01)")
    quarantine = "write the list of all bad rows here, as jsonl"
    check.add_argument("--quarantine", metavar="FILE", type=home_path, help=quarantine)
    add_columns(check, _column_names())
    check.set_defaults(overrides=[])


def run(options: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        DataError: if a source or the template cannot be read.
        ModelError: if the tokenizer cannot be loaded.
    """
    from rich.console import Console

    from rlhf.core.files import write_text
    from rlhf.data.doctor import KINDS, Ruler, examine, serious_faults

    kind, config, chat = _of_recipe(options) if options.config else _of_files(options)
    ruler = Ruler(
        kind=KINDS[kind],
        columns=config.columns,
        chat=chat,
        max_tokens=config.max_tokens,
        system_prompt=config.system_prompt,
        thoughts=config.thoughts,
    )
    groups = {"train": examine(config.train_sources, ruler)}
    if config.eval_sources:
        groups["eval"] = examine(config.eval_sources, ruler)
    console = Console(highlight=False)
    if options.kind is None and not options.config:
        console.print(f"read as {kind} (--kind says otherwise)", markup=False)
    _print_report(console, groups, config.max_tokens if chat else None)
    if options.quarantine:
        rows = [row for found in groups.values() for row in found.bad]
        write_text(options.quarantine, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
        console.print(f"{len(rows)} bad rows listed in {options.quarantine}", markup=False, soft_wrap=True)
    faults = serious_faults(groups["train"], groups.get("eval"), options.max_bad_share)
    for fault in faults:
        console.print(f"NOT FIT: {fault}", markup=False, soft_wrap=True)
    warned = any(notice.startswith("warning") for found in groups.values() for notice in found.notices)
    if not faults:
        console.print("Fit to train on, but see the warnings above." if warned else "Fit to train on.")
    return 1 if faults else 0


def _of_files(options: argparse.Namespace) -> tuple[str, Any, Any]:
    """Kind of the rows, data section and chat format for the files of the command line."""
    from rlhf.data.doctor import guessed_kind

    given = [*options.files, *options.overrides]
    settings = [part for part in given if part.startswith("data.") and "=" in part]
    files = [part for part in given if part not in settings]
    named = {part.partition("=")[0].rpartition(".")[2] for part in settings if part.startswith("data.columns.")}
    named |= given_columns(options, _column_names()).keys()
    kind = _ALIASES.get(options.kind, options.kind) or guessed_kind(files[:1], options.split, named)
    config = _config(kind, files, settings, options)
    return kind, config, _chat_format(options, config)


def _of_recipe(options: argparse.Namespace) -> tuple[str, Any, Any]:
    """Kind of the rows, data section and chat format of a recipe.

    Raises:
        ConfigError: if it is no recipe of a stage that reads rows, or files are given as well.
    """
    from launch.stages import read_stage
    from rlhf.core.errors import ConfigError
    from rlhf.core.paths import recipe_path
    from rlhf.train.chat import load_chat

    given = [*options.files, *options.overrides]
    files = [part for part in given if "=" not in part]
    if files or options.eval or options.kind:
        named = (*files, *options.eval, *filter(None, [options.kind]))
        raise ConfigError(
            f"rlhf data check: --config names the data already; leave out {', '.join(named)}, or change it by "
            "data.train=..., data.eval=..."
        )
    recipes = [recipe_path(path) for path in options.config]
    _, config = read_stage(recipes, given, options.stage, program="rlhf data check")
    rows, model = config.workload.rows, config.model
    path = options.model or model.path
    chat = load_chat(
        path, rows.template_choice, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return _KINDS.get(config.workload.kind, config.workload.kind), rows, chat


def _column_names() -> list[str]:
    from rlhf.data.options import ColumnConfig, ExampleColumns, PromptColumns

    kinds = (ColumnConfig, ExampleColumns, PromptColumns)
    return list(dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind)))


def _config(kind: str, files: list[str], settings: list[str], options: argparse.Namespace) -> Any:
    """The data section that a recipe for these rows would have.

    Raises:
        ConfigError: naming every problem of the settings.
    """
    from omegaconf import OmegaConf

    from rlhf.config import validate
    from rlhf.data.options import DataConfig, ExampleDataConfig, PromptDataConfig

    classes = {"pairs": DataConfig, "prompts": PromptDataConfig}
    given = OmegaConf.to_container(OmegaConf.from_dotlist(settings), resolve=True)
    section: dict[str, Any] = given.get("data", {}) if isinstance(given, dict) else {}
    split = {} if options.split is None else {"split": options.split}
    section = {
        "train": [{"path": path, **split} for path in files],
        "eval": [{"path": path, **split} for path in options.eval],
        **{name: value for name in ("template", "max_tokens") if (value := getattr(options, name)) is not None},
        **section,
        "columns": given_columns(options, _column_names()) | section.get("columns", {}),
    }
    return validate(classes.get(kind, ExampleDataConfig), section, program="rlhf data check", origin="command line")


def _chat_format(options: argparse.Namespace, config: Any) -> Any:
    if options.model is None:
        return None
    from rlhf.core.errors import ModelError
    from rlhf.train.chat import load_chat

    if options.model.startswith((".", "/", "~")) and not Path(options.model).expanduser().is_dir():
        raise ModelError(f"--model {options.model}: there is no such folder")
    return load_chat(Path(options.model).expanduser(), config.template_choice)


def _print_report(console: "Console", groups: "dict[str, Examination]", max_tokens: int | None) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    for role, found in groups.items():
        shapes = ", ".join(f"{count} x {shape}" for shape, count in found.shapes.items())
        for line in (*(f"{role}: {name}" for name in found.names), f"  shapes of rows: {shapes or 'none usable'}"):
            say(line)
    console.print(_rows_table(groups), _lengths_table(groups), _checks_table(groups, max_tokens))
    for role, found in groups.items():
        for kind, rows in found.examples().items():
            say(f"{role}, {kind}: {'; '.join(rows[:_EXAMPLES])}")
        for notice in found.notices:
            say(notice.replace(": ", f": {role}: ", 1))
    for role, found in groups.items():
        if found.bad:
            console.print(_bad_table(role, found))


def _rows_table(groups: "dict[str, Examination]") -> "Table":
    columns = {role: found.counts() for role, found in groups.items()}
    headings = list(dict.fromkeys(name for counts in columns.values() for name in counts))
    table = titled_table("Rows", "", *headings)
    for role, counts in columns.items():
        table.add_row(role, *(str(counts.get(name, 0)) for name in headings))
    return table


def _lengths_table(groups: "dict[str, Examination]") -> "Table":
    unit = groups["train"].unit
    table = titled_table(f"Lengths in {unit}", "", "median", "95 %", "99 %", "longest")
    for role, found in groups.items():
        for part, values in found.quantiles().items():
            table.add_row(f"{role}: {part}", *map(str, values))
    return table


def _checks_table(groups: "dict[str, Examination]", max_tokens: int | None) -> "Table":
    from rlhf.data.doctor import shared_prompts

    table = titled_table("Checks", "", *groups)
    columns = [found.checks(max_tokens) for found in groups.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    if "eval" in groups:
        prompts, pairs = shared_prompts(groups["train"], groups["eval"])
        table.add_row("prompts also in the training data", "", f"{prompts} ({pairs} {groups['eval'].kind.unit})")
    return table


def _bad_table(role: str, found: "Examination") -> "Table":
    from rich.markup import escape

    from rlhf.data.doctor import reasons

    table = titled_table(f"Bad rows of {role}", "reason", "rows", "first examples")
    for reason, rows in reasons(found.bad).items():
        examples = "\n".join(f"{row.row_id}: {row.detail}" for row in rows[:_EXAMPLES])
        table.add_row(reason, str(len(rows)), escape(examples))
    table.columns[-1].justify = "left"
    return table
