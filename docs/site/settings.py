"""Pages of all settings, made from the dataclasses that read them."""

import re
from typing import Any

from launch.pipeline.recipe import PipelineSpec
from launch.slurm.profile import ClusterProfile
from launch.stages import STAGES, Stage
from rlhf.config_options import UNSET, Option, options, shown

FOLDER = "reference/settings"
_INTRODUCTION = """\
# Settings: {title}

{about}

A setting is written as below in a recipe (sections as nested keys) or as `key=value` on the command line. `key[]` is an
item of a list; `NAME` is a name of your own. {source}
"""


def titles() -> dict[str, str]:
    """The pages, with their names in the navigation."""
    stages = {f"{FOLDER}/{name}.md": name for name in STAGES}
    return {**stages, f"{FOLDER}/pipeline.md": "pipeline", f"{FOLDER}/cluster.md": "cluster profile"}


def pages() -> dict[str, str]:
    found = {f"{FOLDER}/{name}.md": _page(name, _stage(stage), stage.config_class()) for name, stage in STAGES.items()}
    pipeline = "The recipe of `rlhf pipeline`. See [pipelines](../../pipelines.md)."
    profile = "The profile of a SLURM cluster, for `rlhf slurm`. See [SLURM](../../slurm.md)."
    found[f"{FOLDER}/pipeline.md"] = _page("pipeline", pipeline, PipelineSpec)
    found[f"{FOLDER}/cluster.md"] = _page("cluster profile", profile, ClusterProfile)
    return found


def _stage(stage: Stage) -> str:
    return f"Everything that a recipe of `python -m {stage.module}` may hold."


def _page(title: str, about: str, config_class: type[Any]) -> str:
    source = f"This page is made from `{config_class.__module__}.{config_class.__qualname__}`."
    parts = [_INTRODUCTION.format(title=title, about=about, source=source)]
    table: list[str] = []
    for option in options(config_class):
        if option.section:
            parts += [*_table(table), f"## {option.key}\n\n{_text(option.doc)}\n"]
            table = []
        else:
            table.append(_row(option))
            if option.kinds:
                parts += [*_table(table), *_kinds(option)]
                table = []
    return "\n".join([*parts, *_table(table)])


def _table(rows: list[str]) -> list[str]:
    return ["| setting | default | type | what it is |\n|---|---|---|---|", *rows, ""] if rows else []


def _row(option: Option) -> str:
    default = "**required**" if option.required else "" if option.default is UNSET else _code(option.default)
    return f"| `{option.key}` | {default} | {_cell(option.type)} | {_cell(option.doc)} |"


def _kinds(option: Option) -> list[str]:
    """What a mapping may hold, by kind."""
    rows = []
    for kind, names in option.kinds.items():
        taken = ", ".join(
            f"`{name}` {_code(value)}" if value is not UNSET else f"`{name}`" for name, value in names.items()
        )
        rows.append(f"| `{kind}` | {taken} |")
    return [f"What `{option.key}` takes, by kind, with the defaults:\n", "| kind | parameters |\n|---|---|", *rows, ""]


def _code(value: Any) -> str:
    text = shown(value, quote=True)
    return f"`{text}`".replace("|", "\\|") if text else ""


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Text of a docstring on one line; what looks like a placeholder is no HTML."""
    text = " ".join(text.split())
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"<(?=[\w/!])", "&lt;", text)
