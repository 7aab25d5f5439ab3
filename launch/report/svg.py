"""Figures as SVG in the page itself: colors are those of its style sheet, so that they follow light, dark and paper."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from launch.report.figures import COLORS, Figure, Line

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 44
TICKS = 5
RADAR_HEIGHT = 320
CROWDED = 6
"""More categories than that have their names in two rows."""
RINGS = 5
"""Circles of a radar plot."""
ROUNDING = 1e-12
"""Values whose differences are a smaller part of them are drawn as equal."""


class _Axis:
    """Places of values between two ends, with ticks at round numbers."""

    def __init__(self, values: Sequence[float], ends: tuple[float, float], *, rounded: bool) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if high - low <= ROUNDING * max(abs(low), abs(high)):
            low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
        self.ticks = ticks_between(low, high)
        if rounded:
            step = self.ticks[1] - self.ticks[0]
            # A rounding error below a round number needs no further step.
            low, high = math.floor(low / step + 1e-3) * step, math.ceil(high / step - 1e-3) * step
            self.ticks = [low + place * step for place in range(round((high - low) / step) + 1)]
        self.low, self.high, self._ends = low, high, ends

    def __call__(self, value: float) -> float:
        start, end = self._ends
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def ticks_between(low: float, high: float) -> list[float]:
    """Round numbers between two others, about five of them."""
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    found = [place * step for place in range(first, last + 1)]
    return found if len(found) > 1 else [low, high]


def bar_width(line: Line) -> float:
    """How far its bars are apart."""
    return min((after - before for before, after in pairwise(line.x)), default=1.0)


def number(value: float, *, percent: bool = False) -> str:
    """A value as an axis or a table shows it."""
    if percent:
        return f"{100 * value:.4g} %"
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def draw(figure: Figure) -> Markup:
    """The figure as an ``svg`` element; names are escaped."""
    if figure.radar is not None:
        return _radar(figure, figure.radar)
    drawn = [line for line in figure.lines if len(line.x)]
    heights = [value for line in drawn for part in (line.y, line.low or (), line.high or ()) for value in part]
    heights += figure.levels if heights else ()
    if any(line.kind == "bars" for line in drawn):
        heights.append(0.0)
    across = [value for line in drawn for value in line.x] + [place for place, _ in figure.marks]
    for line in drawn:
        if line.kind == "bars":
            across += [line.x[0] - bar_width(line) / 2, line.x[-1] + bar_width(line) / 2]
    if figure.categories:
        across = [-0.5, len(figure.categories) - 0.5]
    x = _Axis(across, (LEFT, WIDTH - RIGHT), rounded=False)
    y = _Axis(heights, (HEIGHT - BOTTOM, TOP), rounded=True)
    parts = [*_grid(figure, x, y), *(piece for line in drawn for piece in _line(line, x, y)), *_marks(figure, x)]
    ends = f'data-low="{x.low:.6g}" data-high="{x.high:.6g}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}"'
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="plot" aria-hidden="true" focusable="false" {ends}>'
    return Markup(head + "".join(parts) + "</svg>")


def _radar(figure: Figure, best: float) -> Markup:
    """Categories around a center, from the top on as a clock goes."""
    middle, height, reach = WIDTH / 2, RADAR_HEIGHT / 2, RADAR_HEIGHT / 2 - 24
    count = len(figure.categories)

    def place(number: float, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * number / count
        return middle + reach * value / best * math.sin(angle), height - reach * value / best * math.cos(angle)

    def ring(values: Sequence[float]) -> str:
        around = (place(number, value) for number, value in enumerate(values))
        return " ".join(f"{across:.1f},{up:.1f}" for across, up in around)

    parts = []
    for tick in (best * part / RINGS for part in range(1, RINGS + 1)):
        parts.append(f'<polygon class="grid ring" points="{ring([tick] * count)}"/>')
        across, up = place(0, tick)
        parts.append(f'<text class="ring" x="{across + 3:.1f}" y="{up + 11:.1f}">{escape(number(tick))}</text>')
    for spoke, name in enumerate(figure.categories):
        across, up = place(spoke, best)
        parts.append(f'<line class="grid" x1="{middle}" y1="{height}" x2="{across:.1f}" y2="{up:.1f}"/>')
        side = (across > middle + 1) - (across < middle - 1)
        anchor = ("end", "middle", "start")[side + 1]
        below = 4 if side else (14 if up > height else -6)
        label = f'<text x="{across + 6 * side:.1f}" y="{up + below:.1f}" text-anchor="{anchor}">'
        parts.append(f"{label}{escape(name)}</text>")
    for line in figure.lines:
        tone = f"c{line.color % COLORS}"
        parts.append(f'<polygon class="band {tone}" points="{ring(line.y)}"/>')
        parts.append(f'<polyline class="line {tone}" points="{ring(line.y)} {ring(line.y).partition(" ")[0]}"/>')
    ends = f'data-radar="{count}" data-middle="{middle}" data-height="{height}" data-reach="{reach}"'
    head = f'<svg viewBox="0 0 {WIDTH} {RADAR_HEIGHT}" class="plot" aria-hidden="true" focusable="false" {ends}>'
    return Markup(head + "".join(parts) + "</svg>")


def _grid(figure: Figure, x: _Axis, y: _Axis) -> Iterator[str]:
    for tick in y.ticks:
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        shown = escape(number(tick + 0.0, percent=figure.percent))
        yield f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{shown}</text>'
    floor = HEIGHT - BOTTOM
    for level in figure.levels:
        yield f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
    numbers = [(tick, number(tick + 0.0)) for tick in x.ticks]
    named = [(float(place), name) for place, name in enumerate(figure.categories)] or numbers
    rows = 2 if len(figure.categories) > CROWDED else 1
    room = max(4, round(62 * rows / max(1, len(named))))
    for turn, (place, text) in enumerate(named):
        cut = text if len(text) <= room + 2 else text[: room + 1] + "…"
        below = floor + 11 + 11 * (turn % 2) if rows == 2 else floor + 16
        yield f'<text x="{x(place):.1f}" y="{below}" text-anchor="middle">{escape(cut)}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(figure.x)}</text>'


def _marks(figure: Figure, x: _Axis) -> Iterator[str]:
    for place, text in figure.marks:
        at, late = x(place), x(place) > (LEFT + WIDTH) / 2
        yield f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        anchor, shift = ("end", -5) if late else ("start", 5)
        yield f'<text class="marked" x="{at + shift:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(line: Line, x: _Axis, y: _Axis) -> Iterator[str]:
    tone = f"c{line.color % COLORS}" + (" faint" if line.faint else "") + (" dashed" if line.dashed else "")
    places = [(x(across), y(height)) for across, height in zip(line.x, line.y, strict=True)]
    if line.kind == "line":
        if line.low is not None and line.high is not None:
            there = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, line.high, strict=True)]
            back = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, line.low, strict=True)]
            yield f'<polygon class="band {tone}" points="{" ".join(there + back[::-1])}"/>'
        yield f'<polyline class="line {tone}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'
        if len(places) == 1:
            yield f'<circle class="dot {tone}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3.5"/>'
        return
    if line.kind == "bars":
        width, floor = 0.9 * (x(bar_width(line)) - x(0)), y(0.0)
        for across, height in places:
            top, tall = min(height, floor), abs(floor - height)
            yield f'<rect class="bar {tone}" x="{across - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            yield f'height="{tall:.1f}"/>'
    if line.low is not None and line.high is not None:
        for (across, _), low, high in zip(places, line.low, line.high, strict=True):
            yield f'<line class="whisker {tone}" x1="{across:.1f}" x2="{across:.1f}" y1="{y(low):.1f}" '
            yield f'y2="{y(high):.1f}"/>'
    if line.kind == "points":
        size = 3.6 if len(places) < 60 else 2.2
        for across, height in places:
            yield f'<circle class="dot {tone}" cx="{across:.1f}" cy="{height:.1f}" r="{size}"/>'
