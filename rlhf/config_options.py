"""Which options a config dataclass has: dotted keys, defaults, types and docs, as ``--help`` prints them.

All of it comes from pydantic: the JSON schema of a dataclass holds types, limits and attribute docstrings.
"""

import dataclasses
import difflib
import functools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_jsonable_python
from pydantic_core.core_schema import DataclassSchema, WithDefaultSchema

from rlhf.core.annotations import Formerly, NoResult

ConfigT = TypeVar("ConfigT")
Schema = dict[str, Any]

HELP_WIDTH = 100
COLUMN = 42
UNSET: Any = object()
"""Stands for "no value", where ``None`` is a value like any other."""

_SCALARS = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "null": "null"}
_LIMITS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
    "minLength": "at least {} long",
    "minItems": "at least {}",
    "maxItems": "at most {}",
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key that a recipe may hold: a value (with ``type``) or the head of a section (with ``section``)."""

    key: str
    doc: str
    type: str = ""
    default: Any = UNSET
    required: bool = False
    section: str = ""
    """Name of the dataclass behind a section."""
    kinds: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """What a mapping may hold, by kind (see :func:`rlhf.core.table.listed`)."""


def adapter(config_class: type[ConfigT]) -> TypeAdapter[tuple[ConfigT]]:
    """A validator of one config in a tuple: pydantic takes no settings beside a bare dataclass."""
    return _adapter(types.GenericAlias(tuple, (config_class,)))


@functools.cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    settings = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    return TypeAdapter(shape, config=settings)


def to_dict(config: Any) -> dict[str, Any]:
    """``config`` as JSON-like values: a path becomes a string, a tuple a list."""
    return to_jsonable_python(config)


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """All options by dotted key; an empty section counts as one."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    parts = (flat(value, f"{path}.{key}" if path else str(key)) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


def result_values(config: Any) -> Any:
    """The values of :func:`to_dict`, without the fields that change nothing in what a run publishes (``NoResult``)."""
    if dataclasses.is_dataclass(config):
        kind: type = type(config)
        marked = without_result(kind)
        names = [field.name for field in dataclasses.fields(config) if field.name not in marked]
        return {name: result_values(getattr(config, name)) for name in names}
    if isinstance(config, (list, tuple)):
        return [result_values(item) for item in config]
    if isinstance(config, dict):
        return {key: result_values(value) for key, value in config.items()}
    return to_dict(config)


@functools.cache
def without_result(config_class: type) -> frozenset[str]:
    """The names of the fields that are marked ``NoResult``."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return frozenset(name for name, found in marks.items() if any(isinstance(mark, NoResult) for mark in found))


def renamed_keys(config_class: type, path: str = "") -> Iterator[tuple[str, str]]:
    """Keys of earlier recipes, each with the dotted path that it has now, as the fields say (``Formerly``)."""
    for name, hint in typing.get_type_hints(config_class, include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Formerly):
                yield f"{path}{mark.key}", f"{path}{name}" + (f".{mark.entry}" if mark.entry else "")
        for section in _sections_of(hint):
            yield from renamed_keys(section, f"{path}{name}.")


def _sections_of(hint: Any) -> Iterator[type]:
    """The config dataclasses that a value of this type may be."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType):
        for choice in typing.get_args(hint):
            yield from _sections_of(choice)


def default_values(config_class: type) -> dict[str, Any]:
    """What the dataclass itself says: required options are left out, a required section gives its own."""
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            values[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = to_dict(field.default_factory())
        elif dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = default_values(hints[field.name])
    return values


def options(config_class: type) -> list[Option]:
    """All options, those of a section before its inner sections; a list item is written ``key[]``."""
    schema = adapter(config_class).json_schema(schema_generator=_FullSchema)
    walk = _Walk(schema.get("$defs", {}))
    return list(walk.section(schema["prefixItems"][0], "", default_values(config_class)))


def known_keys(config_class: type) -> list[str]:
    """The keys of all options, and what the mappings among them may hold."""
    found = options(config_class)
    inside = [f"{option.key}.{name}" for option in found for names in option.kinds.values() for name in names]
    return list(dict.fromkeys([*(option.key for option in found), *inside]))


def option_help(config_class: type) -> str:
    """Every option under its section: dotted path, default, type, and the docstring after the field.

    The items of a second list of the same section are not printed again, nor is what a mapping may hold.
    """
    lines: list[str] = []
    printed: dict[str, str] = {}
    tables: list[dict[str, dict[str, Any]]] = []
    repeated: tuple[str, ...] = ()
    for option in options(config_class):
        if option.key.startswith(repeated):
            continue
        if not option.section:
            lines += _option_lines(option)
            if option.kinds not in tables:
                tables.append(option.kinds)
                lines += _kind_lines(option.kinds)
            continue
        twin, doc = printed.setdefault(option.section, option.key), option.doc
        if twin != option.key and option.key.endswith(("[]", ".NAME")):
            repeated, doc = (*repeated, f"{option.key}."), f"as {twin}."
        lines += ["", *_wrapped(f"{option.key}: {doc}" if doc else option.key, indent=0)]
    return "\n".join(lines).strip("\n")


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key most like ``key`` in its whole dotted path or in its last part, if any comes close."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]).ratio()
        return max(whole, last), whole

    index = re.search(r"\[\d+\]", key)
    candidates = [other.replace("[]", index.group()) if index else other for other in known]
    best = max(candidates, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def shown(value: Any, *, quote: bool) -> str:
    """``value`` on one line as JSON, shortened; a string without quotes where ``quote`` is false."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and not quote:
        text = text[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


class _FullSchema(GenerateJsonSchema):
    """Adds what pydantic leaves out: what a ``default_factory`` makes, and the docs of inherited fields."""

    def get_default_value(self, schema: WithDefaultSchema) -> Any:
        if "default_factory" in schema:
            return schema["default_factory"]()  # type: ignore[call-arg]
        return super().get_default_value(schema)

    def dataclass_schema(self, schema: DataclassSchema) -> Schema:
        result = super().dataclass_schema(schema)
        for base in filter(dataclasses.is_dataclass, schema["cls"].__bases__):
            for option in options(base):
                result["properties"].get(option.key, {}).setdefault("description", option.doc)
        return result


class _Walk:
    """A pass through a JSON schema; ``definitions`` is where its ``$ref`` point."""

    def __init__(self, definitions: dict[str, Schema]) -> None:
        self.definitions = definitions

    def follow(self, node: Schema) -> Schema:
        return self.definitions[node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node

    def section(self, node: Schema, path: str, defaults: dict[str, Any]) -> Iterator[Option]:
        section = self.follow(node)
        deeper: list[Option] = []
        for name, field in section["properties"].items():
            key = f"{path}.{name}" if path else name
            default = defaults.get(name, field.get("default", UNSET))
            required = name in section.get("required", ())
            doc = _one_line(field.get("description"))
            if "properties" not in self.follow(field):
                yield Option(
                    key=key,
                    doc=doc,
                    type=self.type_text(field),
                    default=default,
                    required=required,
                    kinds=field.get("kinds", {}),
                )
            for where, target in self.sections_in(field, key):
                inner = self.follow(target)
                doc_of_section = _one_line(inner.get("description")) or doc
                deeper.append(Option(key=where, doc=doc_of_section, section=target.get("$ref", where)))
                below = default if where == key and isinstance(default, dict) else {}
                deeper += self.section(target, where, below)
        yield from deeper

    def sections_in(self, node: Schema, key: str) -> Iterator[tuple[str, Schema]]:
        """Dotted path and schema of each section that the value of one field may hold."""
        if "properties" in self.follow(node):
            yield key, node
        for choice in node.get("anyOf", ()):
            yield from self.sections_in(choice, key)
        if isinstance(node.get("items"), dict):
            yield from self.sections_in(node["items"], f"{key}[]")
        if isinstance(node.get("additionalProperties"), dict):
            yield from self.sections_in(node["additionalProperties"], f"{key}.NAME")

    def type_text(self, node: Schema) -> str:
        node = self.follow(node)
        if "anyOf" in node:
            return " or ".join(self.type_text(choice) for choice in node["anyOf"])
        if "enum" in node or "const" in node:
            return " | ".join(shown(value, quote=False) for value in node.get("enum", [node.get("const")]))
        if "prefixItems" in node:
            return "[" + ", ".join(self.type_text(item) for item in node["prefixItems"]) + "]"
        if "properties" in node:
            return node["title"]
        if node.get("type") == "array":
            item = self.type_text(node.get("items", {}))
            kind = f"list of ({item})" if " or " in item else f"list of {item}"
        elif node.get("type") == "object":
            inner = node.get("additionalProperties")
            kind = f"mapping of {self.type_text(inner if isinstance(inner, dict) else {})}"
        else:
            kind = "path" if node.get("format") == "path" else _SCALARS.get(node.get("type", ""), "any")
        limits = ", ".join(text.format(node[name]) for name, text in _LIMITS.items() if name in node)
        return f"{kind} {limits}".rstrip()


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _option_lines(option: Option) -> list[str]:
    default = "" if option.default is UNSET else f"={shown(option.default, quote=False)}"
    left = f"  {option.key}{default}"
    right = f"{option.type} (required)" if option.required else option.type
    if len(left) + 2 <= COLUMN and len(right) <= HELP_WIDTH - COLUMN:
        head = [f"{left:<{COLUMN}}{right}"]
    else:
        head = [*_wrapped(left.strip(), indent=2), *_wrapped(right, indent=COLUMN)]
    return head + _wrapped(option.doc, indent=8)


def _kind_lines(kinds: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    docs: dict[str, str] = {}
    for kind, parameters in kinds.items():
        named = (
            f"{name}={shown(about['default'], quote=False)}" if "default" in about else f"{name} (required)"
            for name, about in parameters.items()
        )
        lines += _wrapped(f"{kind}: {', '.join(named) or 'none'}", indent=10)
        docs |= {name: about["doc"] for name, about in parameters.items() if about["doc"]}
    for name, doc in docs.items():
        lines += _wrapped(f"{name}: {doc}", indent=10)
    return lines


def _wrapped(text: str, *, indent: int) -> list[str]:
    pad = " " * indent
    return textwrap.wrap(text, HELP_WIDTH, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False)
