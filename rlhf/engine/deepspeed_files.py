"""Reading DeepSpeed JSON: the shipped files by name, a user's by path, with comments and every fault of form.

``//`` and ``/* */`` comments are taken, nothing else that JSON does not have: hjson, with which DeepSpeed reads its
files, also takes a missing comma or quote, and turns the rest of the line into a string.
"""

import copy
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf.core.errors import ConfigError

Role = Literal["train", "frozen"]
Source = Path | str | Mapping[str, Any]

_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


class _Section(dict):
    """An object of the file; ``twice`` are keys that stand in it more than once."""

    twice: tuple[str, ...] = ()


def shipped_names(role: Role = "train") -> list[str]:
    """Short names of the configurations that come with the toolkit."""
    names = [entry.name for entry in importlib.resources.files("ds_configs").iterdir()]
    mine = [name.removeprefix(f"{role}_") for name in names if name.startswith(f"{role}_") and name.endswith(".json")]
    return sorted(name.removesuffix(".json") for name in mine)


def is_shipped_name(source: Source) -> bool:
    """Whether ``source`` has the form of a short name, and not that of a path."""
    return isinstance(source, str) and "/" not in source and not source.endswith(".json")


def role_of(source: Source) -> Role | None:
    """The role that a name such as ``frozen_zero3`` begins with; ``None`` where it leaves that open."""
    for role in ("train", "frozen"):
        if is_shipped_name(source) and str(source).startswith(f"{role}_"):
            return role
    return None


def read(source: Source, role: Role = "train") -> tuple[str, dict[str, Any], list[str]]:
    """Name for messages, a copy of the contents that may be changed, and keys that stand twice, as problems.

    Args:
        source: a JSON file, its contents, or the name of a shipped one: "zero2", or "train_zero2".
        role: of which a short name without one is.
    Raises:
        ConfigError: if the file cannot be read or is no JSON object.
    """
    if isinstance(source, Mapping):
        return "DeepSpeed configuration", copy.deepcopy(dict(source)), []
    name, path = _located(source, role)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        config = json.loads(_without_comments(text), object_pairs_hook=_section)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{name}: invalid JSON at {where}: {error.msg}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: expected a JSON object, found {shown(config)}")
    return name, config, list(_doubled(config, ""))


def shown(value: Any) -> str:
    """A value for messages, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _located(source: Path | str, role: Role) -> tuple[str, Any]:
    if not is_shipped_name(source):
        return str(source), Path(source)
    role = role_of(source) or role
    short = str(source).removeprefix(f"{role}_")
    if short not in shipped_names(role):
        known = ", ".join(shipped_names(role))
        raise ConfigError(f"{source}: no such DeepSpeed configuration (shipped: {known}; or give a path to a JSON)")
    path = importlib.resources.files("ds_configs") / f"{role}_{short}.json"
    return f"ds_configs/{path.name}", path


def _without_comments(text: str) -> str:
    """``text`` with blanks for comments, so that faults keep their line and column."""

    def blank(found: re.Match) -> str:
        return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])

    return _STRING_OR_COMMENT.sub(blank, text)


def _section(pairs: list[tuple[str, Any]]) -> _Section:
    section = _Section(pairs)
    keys = [key for key, _ in pairs]
    section.twice = tuple(key for key in section if keys.count(key) > 1)
    return section


def _doubled(node: Any, path: str) -> Iterator[str]:
    for key in getattr(node, "twice", ()):
        yield f"{_joined(path, key)}: stands there more than once, and the last one would win; keep one"
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _doubled(value, _joined(path, key))


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
