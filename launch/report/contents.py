"""What a page is made of: sections of sentences, figures, tables and texts to read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.report.figures import Figure, Line, smoothed, thinned
from launch.report.reading import Run
from launch.report.svg import number

WINDOWS = 15
"""A noisy curve is smoothed over this part of it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One field of a table."""

    text: str
    order: float | None = None
    """What it is sorted by, where its text will not do."""
    link: str = ""
    """Name of a place in the page."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows to compare; every column can be sorted by."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A response, in parts of which some are marked as new."""

    title: str
    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A prompt with responses beside each other."""

    title: str
    prompt: str
    texts: tuple[Text, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Passages of one kind."""

    title: str
    passages: tuple[Passage, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Something that looks wrong, and what to change."""

    run: str
    text: str
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """What is to be said of the runs of one stage."""

    key: str
    title: str
    lead: tuple[str, ...] = ()
    """Sentences that say what came out; a terminal shows them, too."""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    readings: tuple[Reading, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def filled(self) -> "Section":
        """The same section, less the figures of which nothing is known."""
        return replace(self, figures=tuple(each for each in self.figures if not each.is_empty))

    @property
    def is_empty(self) -> bool:
        """Whether it has a title and no more."""
        return not (self.lead or self.figures or self.tables or self.readings or self.advice)


def named(run: Run, runs: Sequence[Run], text: str) -> str:
    """A sentence about one of several runs says of which."""
    return f"{text[0].upper()}{text[1:]}" if len(runs) == 1 else f"{run.name}: {text}"


def cell(value: float | None, text: str | None = None) -> Cell:
    """A number, or a dash where there is none."""
    if value is None:
        return Cell(text="–", order=-math.inf)
    return Cell(text=number(value) if text is None else text, order=value)


def share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def run_cell(run: Run, number: int) -> Cell:
    """The name of a run, which leads to what is known of it."""
    return Cell(text=run.name, link=f"run-{number}")


def curves(
    key: str,
    title: str,
    runs: Sequence[Run],
    metrics: Mapping[str, str],
    y: str,
    *,
    held_out: str = "",
    noisy: bool = True,
    x: str = "step",
    **more: Any,
) -> Figure:
    """Metrics along the runs.

    Args:
        key: name of the figure.
        title: of the figure.
        runs: of one stage; each has a color, or if there is one alone, each metric.
        metrics: names of metrics by what they are called.
        y: label with unit.
        held_out: a metric of evaluations, drawn as points.
        noisy: draw means over some steps, and of a single run the single steps behind them.
        x: label with unit.
        more: further fields of the figure.
    """
    lines: list[Line] = []
    for place, run in enumerate(runs):
        for part, (label, metric) in enumerate(metrics.items()):
            steps, values = run.columns.get(metric, ((), ()))
            color = part if len(runs) == 1 else place
            name = " ".join(filter(None, [run.name if len(runs) > 1 else "", label if len(metrics) > 1 else ""]))
            lines += _curve(name or label, steps, values, color, noisy=noisy, alone=len(runs) == 1, dashed=part > 0)
        steps, values = run.columns.get(held_out, ((), ()))
        name = "held out" if len(runs) == 1 else f"{run.name} held out"
        color = len(metrics) if len(runs) == 1 else place
        if values:
            lines.append(Line(name=name, x=steps, y=values, color=color, kind="points"))
    return Figure(key=key, title=title, x=x, y=y, lines=tuple(lines), **more)


def _curve(
    name: str, steps: Sequence[float], values: Sequence[float], color: int, *, noisy: bool, alone: bool, dashed: bool
) -> list[Line]:
    if not values:
        return []
    dashed = dashed and not alone
    window = max(1, len(values) // WINDOWS) if noisy else 1
    across = thinned(steps)
    mean = Line(name=name, x=across, y=thinned(smoothed(values, window)), color=color, dashed=dashed)
    if window == 1 or not alone:
        return [mean]
    single = Line(name=f"{name}, single steps", x=across, y=thinned(values), color=color, faint=True)
    return [single, mean]


def points(name: str, entries: Iterable[tuple[float, Mapping[str, Any]]], color: int = 0, **more: Any) -> Line:
    """Estimates with their intervals at places of the horizontal axis."""
    found = [(place, each) for place, each in entries]
    return Line(
        name=name,
        x=[place for place, _ in found],
        y=[each["value"] for _, each in found],
        low=[each["low"] for _, each in found],
        high=[each["high"] for _, each in found],
        color=color,
        kind="points",
        **more,
    )
