"""The configuration of a run: dataclass defaults < recipe YAML < ``key=value`` on the command line.

A config is a frozen dataclass whose fields are plain values or further dataclasses (sections). omegaconf
merges recipes and overrides, so ``${section.key}`` refers to another option; pydantic validates the result in
strict JSON mode, where ``1.5`` is no int and ``true`` no float. Which options exist, the dataclasses decide.
Mappings are merged key by key, so an option that holds a free mapping must default to an empty one.
"""

import argparse
import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf.config_options import (
    UNSET,
    adapter,
    default_values,
    flat,
    known_keys,
    nearest,
    option_help,
    renamed_keys,
    result_values,
    shown,
    to_dict,
)
from rlhf.core.errors import ConfigError
from rlhf.core.paths import at_home, beside, home_path, recipe_path
from rlhf.core.table import REQUIRED, KindError

__all__ = [
    "Invocation",
    "escaped",
    "flat",
    "load_config",
    "option_help",
    "parse_command_line",
    "read_recipe",
    "read_tree",
    "result_values",
    "to_dict",
    "to_yaml",
    "validate",
]

ConfigT = TypeVar("ConfigT")

_OLD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class OldNumber(ValueError):
    """A number that YAML 1.1 reads as another one."""


@dataclass(frozen=True, kw_only=True)
class Invocation(Generic[ConfigT]):
    """What one command line asks for."""

    config: ConfigT
    dry_run: bool
    log_folder: Path | None
    """Where every rank writes what it prints; ``None`` for nowhere but to the terminal."""
    recipes: tuple[Path, ...]
    overrides: tuple[str, ...]


def parse_command_line(
    config_class: type[ConfigT], argv: Sequence[str], *, program: str, description: str
) -> Invocation[ConfigT]:
    """Read ``[--config FILE]... [--dry-run] [--log-folder DIR] [key=value]...``; ``--help`` lists all settings.

    ``--local_rank``, which the deepspeed launcher puts in front, is accepted and ignored.

    Raises:
        ConfigError: naming every problem of the recipes and overrides.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="settings (key=default, type):\n" + option_help(config_class),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    several = "a recipe (YAML), or shipped:NAME; may be given again, later ones win"
    parser.add_argument("--config", metavar="FILE", type=recipe_path, action="append", default=[], help=several)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and exit")
    logs = "write what each rank prints to DIR/rank<N>.log instead"
    parser.add_argument("--log-folder", metavar="DIR", type=home_path, help=logs)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a setting; wins over recipes")
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        hint = "unknown option (--help lists all; settings are written key=value, without dashes)"
        raise _failure(program, "command line", [f"{argument}: {hint}" for argument in unknown])
    recipes, overrides = tuple(arguments.config), tuple(arguments.overrides)
    config = load_config(config_class, recipes, overrides, program=program)
    return Invocation(
        config=config,
        dry_run=arguments.dry_run,
        log_folder=arguments.log_folder,
        recipes=recipes,
        overrides=overrides,
    )


def load_config(
    config_class: type[ConfigT],
    recipes: Sequence[Path],
    overrides: Sequence[str],
    *,
    program: str,
    settings: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Merge defaults, ``recipes``, ``settings`` and ``overrides`` (later ones win) and validate them.

    A config class may have a static method ``defaults_given(values) -> {dotted key: value}``: further defaults, which
    depend on the values of a recipe that was merged, and were not validated yet.

    Args:
        config_class: the dataclass of the recipe.
        recipes: YAML files.
        overrides: ``key=value``, the value being YAML.
        program: start of messages.
        settings: plain values in which nothing is a reference any more, by dotted key; those inside of mappings by
            their own keys.
    Raises:
        ConfigError: listing every problem, one a line, each with its dotted path and the value found.
    """
    files = ", ".join(str(recipe) for recipe in recipes)
    parts = [files, "settings" if settings else "", "command line" if overrides else ""]
    origin = " + ".join(filter(None, parts)) or "no recipe"
    defaults = OmegaConf.create(escaped(default_values(config_class)))
    tree = _merge(defaults, recipes, settings or {}, overrides, program, origin)
    defaults_given = getattr(config_class, "defaults_given", None)
    if defaults_given is not None:
        for _ in range(2):  # such a default may depend on another one
            for key, value in defaults_given(OmegaConf.to_container(tree)).items():
                OmegaConf.update(defaults, key, escaped(value))
            tree = _merge(defaults, recipes, settings or {}, overrides, program, origin)
    try:
        merged = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise _failure(program, origin, [f"{error.full_key}: {_first_line(error)}"]) from None
    return validate(config_class, merged, program=program, origin=origin)


def validate(config_class: type[ConfigT], merged: Any, *, program: str, origin: str) -> ConfigT:
    """A config from plain values.

    Raises:
        ConfigError: as :func:`load_config`; it starts with ``program`` and ``origin``.
    """
    try:
        values = beside(_at_home(merged), Path())
        return adapter(config_class).validate_json(json.dumps([values]), strict=True)[0]
    except ConfigError as error:
        raise _failure(program, origin, [str(error)]) from None
    except ValidationError as error:
        raise _failure(program, origin, _explain(error, merged, config_class)) from None


def to_yaml(config: Any) -> str:
    """The resolved copy: a recipe that :func:`load_config` turns into an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(to_dict(config))))


def _merge(
    defaults: DictConfig,
    recipes: Sequence[Path],
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    program: str,
    origin: str,
) -> DictConfig:
    """Defaults, recipes and overrides in one tree; what cannot even be read is reported here, all at once."""
    tree = OmegaConf.create(defaults)
    faults: list[str] = []
    for recipe in recipes:
        try:
            tree = typing.cast(DictConfig, OmegaConf.merge(tree, read_recipe(Path(recipe))))
        except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
            faults.append(f"{recipe}: {_first_line(error)}")
    for key, value in settings.items():
        try:
            _set(tree, key, value)
        except (IndexError, ValueError, TypeError, OmegaConfBaseException) as error:
            faults.append(f"{key}: {_first_line(error)}")
    for override in overrides:
        try:
            _apply_override(tree, override)
        except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
            faults.append(f"{override}: {_first_line(error)}")
    if faults:
        raise _failure(program, origin, faults)
    return tree


def _set(tree: DictConfig, key: str, value: Any) -> None:
    """Merge ``value`` into ``tree`` at the dotted ``key``. Inside of it keys are taken as they are, dots and all."""
    OmegaConf.update(tree, key, escaped(value), merge=value != {})  # merged, {} would leave a mapping as it is
    if isinstance(value, Mapping) and value:
        _empty(OmegaConf.select(tree, key), value)


def _empty(node: Any, value: Mapping[str, Any]) -> None:
    """Empty the mappings below ``node`` that are empty in ``value``."""
    for key, item in value.items():
        if isinstance(item, Mapping) and isinstance(node, DictConfig):
            if item:
                _empty(node._get_node(key), item)
            else:
                node[key] = {}


def read_recipe(path: Path) -> DictConfig:
    """The tree of a YAML file, with its references unresolved.

    Texts that begin with ``./`` or ``../`` are paths that start in the folder of the file.

    Raises:
        OSError, ValueError, yaml.YAMLError: if it is not there, or holds no mapping.
    """
    return OmegaConf.create(beside(OmegaConf.to_container(read_tree(path)), path.parent))


def read_tree(path: Path) -> DictConfig:
    """The tree of a YAML file with all texts as they stand, else as :func:`read_recipe`."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.y*ml")], 1)
        raise ValueError("no such file" + (f" (did you mean {path.parent / near[0]}?)" if near else ""))
    refuse_old_numbers(path.read_text(encoding="utf-8-sig"))
    tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig):
        raise ValueError("expected a mapping of options at the top level, found a list")
    return tree


def _apply_override(tree: DictConfig, override: str) -> None:
    """Set one ``key=value`` in ``tree``; an item of a list is addressed as ``key[0]``."""
    if not re.match(r"[^=\s]+=", override):
        recipe = f" (did you mean --config {override}?)" if override.endswith((".yaml", ".yml")) else ""
        raise ValueError(f"expected key=value{recipe}")
    try:
        key, _, value = override.partition("=")
        if value.strip() == "{}":  # merged, it would leave a mapping as it is
            OmegaConf.update(tree, key, {}, merge=False)
        refuse_old_numbers(value)
        tree.merge_with_dotlist([override])
    except yaml.YAMLError as error:
        raise ValueError(f"{_first_line(error)} (text may need quotes: key='\"text\"')") from None
    except OldNumber:
        raise
    except (IndexError, ValueError) as error:  # no such index, or a name where a list wants an index
        hint = "a list is set as a whole, or item by item as key[0].name=value"
        raise ValueError(f"{_first_line(error)} ({hint})") from None


def refuse_old_numbers(text: str) -> None:
    """Refuse what YAML 1.1 silently reads as another number than stands there: 0123 as 83, 12:30 as 750.

    Raises:
        OldNumber: naming the first one, with its line.
        yaml.YAMLError: if ``text`` is no YAML.
    """
    for token in yaml.scan(text):
        if not isinstance(token, yaml.ScalarToken) or not token.plain or not _OLD_NUMBER.fullmatch(token.value):
            continue
        read = yaml.safe_load(token.value)
        if isinstance(read, int | float):
            raise OldNumber(
                f"line {token.start_mark.line + 1}: {token.value} would be read as {read} (YAML 1.1 takes a leading 0 "
                f"for octal, and colons for base 60): write a decimal number, or '{token.value}' in quotes for a text"
            )


def escaped(value: Any) -> Any:
    """Protect a literal ``${`` from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _at_home(value: Any) -> Any:
    """The values with the home folder in place of a leading ~, as a shell does it for paths."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return at_home(value) if isinstance(value, str) and (value + "/").startswith("~/") else value


def _explain(error: ValidationError, merged: Any, config_class: type) -> list[str]:
    """One line a problem; what the members of a union each complain about becomes one line.

    Of a value and something inside it, only the inner fault counts: the outer one comes from a union member
    that the value was not meant for, or from a tuple that finds itself short because of its invalid items.
    """
    known = known_keys(config_class)
    renamed = dict(renamed_keys(config_class))
    located = [(details, *_locate(details, merged)) for details in error.errors(include_url=False)]
    problems: dict[str, list[str]] = {}
    for details, path, value in located:
        if any(inner.startswith((f"{path}.", f"{path}[")) for _, inner, _ in located):
            continue
        for key, found, words in _problems_at(details, path, value, known, renamed):
            subject = key if found is UNSET else f"{key} = {shown(found, quote=True)}"
            problems.setdefault(subject, []).append(words)
    return [f"{subject}: {' or '.join(words)}".removeprefix(": ") for subject, words in problems.items()]


def _locate(details: ErrorDetails, merged: Any) -> tuple[str, Any]:
    """Dotted path of a fault and the value found, ``UNSET`` where there is none to show.

    pydantic names the members of a union in the location ("lr", "float"); they are no keys and passed over.
    """
    path, value = "", merged
    for part in details["loc"][1:]:
        if isinstance(value, list) and isinstance(part, int):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            path, value = f"{path}.{part}", value[part]
    if details["type"] == "missing":
        path, value = f"{path}.{details['loc'][-1]}", UNSET
    elif details["type"] == "value_error" and isinstance(value, dict):
        value = UNSET  # a cross-field check: its message says which values do not go together
    return path.lstrip("."), value


def _problems_at(
    details: ErrorDetails, path: str, value: Any, known: Sequence[str], renamed: Mapping[str, str]
) -> list[tuple[str, Any, str]]:
    """Key, value (``UNSET`` for none to show) and complaint: one, or as many as the parameters of a kind have."""
    error = details.get("ctx", {}).get("error")
    if not isinstance(error, KindError):
        return [(path, value, _complaint(details, path, known, renamed))]
    return [(f"{path}.{key}", UNSET if found is REQUIRED else found, words) for key, found, words in error.problems]


def _complaint(details: ErrorDetails, path: str, known: Sequence[str], renamed: Mapping[str, str]) -> str:
    if details["type"] == "missing":
        return f"required, but not set (in the recipe, or as {path}=...)"
    if details["type"] == "unexpected_keyword_argument":
        near = renamed.get(path) or nearest(path, known)
        return f"unknown key (did you mean {near}?)" if near else "unknown key (--help lists all)"
    if details["type"] == "dataclass_type":
        return "a section, which takes a mapping of options and not a single value"
    if details["type"] in ("list_type", "tuple_type"):
        return "Input should be a list"
    if details["type"] == "string_type" and isinstance(details["input"], bool | int | float):
        return f"{details['msg']} (put it in quotes)"
    return details["msg"].removeprefix("Value error, ")


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"invalid YAML at line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0]


def _failure(program: str, origin: str, problems: Sequence[str]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError("\n  ".join([f"{program}: {origin}: {count}", *problems]))
