"""Paths as people write them."""

import importlib.resources
import os
import re
from pathlib import Path
from typing import Any

from rlhf.core.errors import ConfigError

SHIPPED = "shipped:"
_HOME = re.compile(r"~(/|$)")


def at_home(text: str) -> str:
    """A text with the home folder for a leading ``~`` that no shell has seen (``--output=~/runs``).

    Raises:
        ConfigError: if no home folder is known, as where a container knows nothing of its user.
    """
    found = os.path.expanduser(text)
    if _HOME.match(found):
        raise ConfigError(f"{text}: no home folder is known here (HOME is not set); write the path from / on")
    return found


def home_path(text: str) -> Path:
    """The same as a path."""
    return Path(at_home(text))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that are installed with the program, by name."""
    folder = Path(str(importlib.resources.files("launch"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(text: str) -> Path:
    """The path of a recipe; ``shipped:NAME`` is one that is installed with the program.

    Raises:
        ConfigError: if no recipe of that name ships.
    """
    if not text.startswith(SHIPPED):
        return home_path(text)
    shipped, name = shipped_recipes(), text.removeprefix(SHIPPED).removesuffix(".yaml")
    if name not in shipped:
        raise ConfigError(f"{text}: no recipe of this name ships; there are {', '.join(shipped)}")
    return shipped[name]


def beside(value: Any, folder: Path) -> Any:
    """``value`` with texts that begin with ``./`` or ``../``, at any depth, as paths that start in ``folder``.

    They are relative to the working folder where they lie below it, else absolute.
    """
    if isinstance(value, dict):
        return {key: beside(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [beside(item, folder) for item in value]
    if not isinstance(value, str) or not value.startswith(("./", "../")) or "\n" in value:
        return value
    path, here = Path(os.path.abspath(folder / value)), Path.cwd()
    return str(path.relative_to(here) if here in path.parents else path)


def can_be_hub_name(path: str) -> bool:
    """Whether the hub could have something of that name, NAME or OWNER/NAME; else it is a place on this machine."""
    return not path.startswith(("/", ".", "~")) and path.count("/") < 2
