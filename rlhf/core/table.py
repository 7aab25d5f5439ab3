"""Tables of kinds: the names that a recipe may give, each with its function and what that takes.

A table says so without importing its functions, which would bring torch along: recipes are read, listed and refused
without it. The first call of a row compares it with its function.
"""

import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

CLOSE = 0.8
"""How alike names of kinds must be to be taken for each other: these are short, and "dpo" is not "r_dpo"."""

REQUIRED: Any = object()
"""Stands for the default of a parameter that has none."""


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter of a function."""

    type: Any
    """The type as a config has it: plain, a Literal, or one with limits, ``Annotated[float, Gt(0)]``."""
    default: Any = REQUIRED
    doc: str = field(default="", compare=False)
    """What ``--help`` says of it."""


@dataclass(frozen=True)
class Row:
    """A kind: its function, by name, and what the function takes."""

    function: str
    """``module:function``."""
    _: KW_ONLY
    inputs: tuple[str, ...] = ()
    """Tensors that it is always given."""
    optional: tuple[str, ...] = ()
    """Tensors that it can do without, and that the stages do not have."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """What a recipe may set, by name."""

    @property
    def arguments(self) -> frozenset[str]:
        """What the function takes beside hyper-parameters."""
        return frozenset((*self.inputs, *self.optional))

    @property
    def hyperparameters(self) -> Mapping[str, Parameter]:
        """Those of the function: all its keyword-only parameters that are no :attr:`arguments`."""
        return self.parameters

    @functools.cached_property
    def implementation(self) -> Callable[..., Any]:
        """The function.

        Raises:
            TypeError: if it takes anything else than this row says.
        """
        module, _, name = self.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        self.check_against(function)
        return function

    def check_against(self, function: Callable[..., Any]) -> None:
        """Compare the row with the signature of its function.

        Raises:
            TypeError: naming every difference.
        """
        signature = inspect.signature(function, eval_str=True).parameters
        found = {name: option for name, option in signature.items() if name not in self.arguments}
        faults = [f"{name} is no parameter of the function" for name in self.arguments - signature.keys()]
        own = self.hyperparameters
        for name in found.keys() | own.keys():
            if name not in own:
                faults.append(f"{found[name]} is not in the row")
            elif name not in found:
                faults.append(f"{name} is no parameter of the function")
            elif found[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                faults.append(f"{found[name]} is a hyper-parameter, but not keyword-only")
            elif not _alike(own[name], found[name]):
                faults.append(f"{found[name]} stands there as {own[name]}")
        if faults:
            raise TypeError(f"{self.function} and its row differ: {'; '.join(sorted(faults))}")


class KindError(ValueError):
    """A kind that does not exist, or parameters that it does not take."""

    def __init__(self, problems: list[tuple[str, Any, str]]) -> None:
        """``problems``: the key inside the section, the value found (:data:`REQUIRED` for none), and what is wrong."""
        shown = (f"{key}{'' if value is REQUIRED else f' = {value}'}: {words}" for key, value, words in problems)
        super().__init__("; ".join(shown))
        self.problems = tuple(problems)


def parameter_values(table: Mapping[str, Row], kind: str, given: Mapping[str, Any], *, noun: str) -> dict[str, Any]:
    """All hyper-parameters of a kind, by name: what is ``given``, else their defaults.

    Args:
        table: the kinds there are.
        kind: the one that is asked for.
        given: values of a recipe.
        noun: what a kind is, for messages: "loss".
    Raises:
        KindError: if there is no such kind, it does not take one of ``given``, or not such a value, or lacks one.
    """
    if kind not in table:
        near = difflib.get_close_matches(kind, table, 1, CLOSE)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise KindError([("kind", kind, f"no such {noun}{hint}; there are {', '.join(sorted(table))}")])
    parameters = table[kind].parameters
    problems: list[tuple[str, Any, str]] = []
    values: dict[str, Any] = {}
    for name in given:
        if name not in parameters:
            problems.append((f"parameters.{name}", given[name], _misplaced(table, kind, name)))
    for name, parameter in parameters.items():
        value = given.get(name, parameter.default)
        if value is REQUIRED:
            problems.append((f"parameters.{name}", REQUIRED, f"required by kind = {kind}, but not set"))
            continue
        try:
            values[name] = _adapter(parameter.type).validate_python(value, strict=True)
        except ValidationError as error:
            words = " or ".join(dict.fromkeys(details["msg"] for details in error.errors(include_url=False)))
            problems.append((f"parameters.{name}", value, words))
    if problems:
        raise KindError(problems)
    return values


def listed(table: Mapping[str, Row]) -> FieldInfo:
    """An annotation for the option that holds parameters: ``--help`` and "did you mean" then know them by kind."""
    kinds: Any = {
        kind: {
            name: {"doc": parameter.doc} | ({} if parameter.default is REQUIRED else {"default": parameter.default})
            for name, parameter in row.parameters.items()
        }
        for kind, row in table.items()
    }
    return Field(json_schema_extra={"kinds": kinds})


def _misplaced(table: Mapping[str, Row], kind: str, name: str) -> str:
    own = table[kind].parameters
    takes = f"kind = {kind} takes {', '.join(sorted(own)) or 'no parameters'}"
    others = sorted(other for other, row in table.items() if name in row.parameters)
    if others:
        return f"{takes}; {name} belongs to {', '.join(others)}"
    near = difflib.get_close_matches(name, own, 1)
    return f"unknown (did you mean {near[0]}?): {takes}" if near else takes


def _alike(parameter: Parameter, found: inspect.Parameter) -> bool:
    default = REQUIRED if found.default is inspect.Parameter.empty else found.default
    same_default = default is parameter.default or (
        type(default) is type(parameter.default) and default == parameter.default
    )
    return same_default and _bare(parameter.type) == found.annotation


def _bare(annotation: Any) -> Any:
    """The type without limits, inside unions, too."""

    def holder() -> None: ...

    holder.__annotations__ = {"type": annotation}
    return typing.get_type_hints(holder)["type"]


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
