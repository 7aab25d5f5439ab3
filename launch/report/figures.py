"""What is drawn, apart from how: lines, points and bars with their units. Colors are numbers of a palette."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLORS = 8
"""Colors of the palette (templates/page.css); further lines begin anew."""
MOST_POINTS = 400
"""A longer line is drawn as the means of equal parts of it."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing in a figure."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower ends of intervals: of a line a band, of points and bars a whisker."""
    high: Sequence[float] | None = None
    color: int = 0
    kind: Literal["line", "points", "bars"] = "line"
    dashed: bool = False
    faint: bool = False
    """Stands behind others."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot."""

    key: str
    """Its name in the page."""
    title: str
    x: str
    """Label of the horizontal axis, with its unit."""
    y: str
    lines: tuple[Line, ...]
    note: str = ""
    categories: tuple[str, ...] = ()
    """Words at 0, 1, 2... of the horizontal axis, in the place of numbers."""
    marks: tuple[tuple[float, str], ...] = ()
    """Places on the horizontal axis, with words."""
    levels: tuple[float, ...] = ()
    """Heights of dotted lines."""
    percent: bool = False
    """Values are shares, shown as percentages."""
    radar: float | None = None
    """Categories stand around a center, with values from 0 there to this at the rim; ``None`` for axes."""

    @property
    def is_empty(self) -> bool:
        return not any(len(line.x) for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """What scripts of the page read."""
        return {
            "key": self.key,
            "x": self.x,
            "y": self.y,
            "percent": self.percent,
            "categories": [*self.categories],
            "radar": self.radar,
            "marks": [[place, text] for place, text in self.marks],
            "levels": [*self.levels],
            "lines": [
                {
                    "name": line.name,
                    "x": _short(line.x),
                    "y": _short(line.y),
                    "low": None if line.low is None else _short(line.low),
                    "high": None if line.high is None else _short(line.high),
                    "color": line.color % COLORS,
                    "kind": line.kind,
                    "dashed": line.dashed,
                    "faint": line.faint,
                }
                for line in self.lines
            ],
        }


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def thinned(values: Sequence[float]) -> list[float]:
    """Means of so many equal parts that a line has room for them."""
    parts = min(len(values), MOST_POINTS)
    if parts == len(values):
        return [*values]
    cuts = [round(place * len(values) / parts) for place in range(parts + 1)]
    return [math.fsum(values[start:end]) / (end - start) for start, end in itertools.pairwise(cuts)]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means of each value and those before it, ``window`` at most."""
    found, behind, ahead = [], [0.0] * (window + 1), 0.0
    for place, value in enumerate(values):
        if place and place % window == 0:
            # Sums of the ends of the block before: nothing is taken off a sum again, so that no rounding error stays.
            ends = itertools.accumulate(reversed(values[place - window : place]), initial=0.0)
            behind = [*ends][::-1]
            ahead = 0.0
        ahead += value
        found.append((behind[place % window + 1] + ahead) / min(place + 1, window))
    return found
