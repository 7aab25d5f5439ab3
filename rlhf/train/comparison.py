"""How runs of one stage are compared with each other: what a stage knows of that, beside its metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of the table."""

    metric: str
    label: str
    layout: str = ".4g"
    """How its number is written, as for :func:`format`."""


def _as_they_are(runs: Sequence[tuple[Any, Metrics]]) -> list[Metrics]:
    return [metrics for _, metrics in runs]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a stage has to say; all of it may be left out."""

    columns: tuple[Column, ...] = ()
    """Metrics that are shown; if there are none, the key metric and all other held-out ones."""
    notes: tuple[str, ...] = ()
    """What a reader of the table has to know."""
    all_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the value ``all`` stands for, by setting."""
    span: tuple[str, str] | None = None
    """Two metrics that are drawn as the ends of a line beside the key metric."""
    span_label: str = ""
    chance: float | None = None
    """The key metric of a guess."""
    complete: Callable[[Sequence[tuple[Any, Metrics]]], list[Metrics]] = _as_they_are
    """Takes configs and metrics of all runs, and gives their metrics with what only the others tell of a run."""
