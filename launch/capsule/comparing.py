"""Whether two runs are the same: their metrics step by step. Plain rows in, a frozen verdict out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Numbers that are no farther apart than this differ by rounding: another order of the same sums."""
SMALL_BY_NATURE = "learning_rate"
"""Metrics of this ending are worked out, not measured: near 0 they have no rounding of their own."""
NOT_COMPARED = ("time/", "memory/")
"""Metrics of the machine, not of the run."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a run compares with an earlier one."""

    kind: Literal["equal", "within rounding", "different"]
    steps: int
    """Rows that were compared."""
    step: int | None = None
    """The first that differs, beyond rounding if there is one such."""
    metric: str = ""
    """The metric that differs most in it."""
    before: float | None = None
    now: float | None = None

    def __str__(self) -> str:
        if self.kind == "equal":
            return f"equal: all metrics of {self.steps} rows"
        shown = f"{self.metric} was {_shown(self.before)} and is {_shown(self.now)}"
        if self.kind == "within rounding":
            return f"within rounding: {self.steps} rows; farthest apart at step {self.step}: {shown}"
        return f"different, first at step {self.step}: {shown}"


def _shown(value: float | None) -> str:
    return "not there" if value is None else f"{value:.9g}"


def comparable(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows without what is of the machine."""
    return [{name: value for name, value in row.items() if not name.startswith(NOT_COMPARED)} for row in rows]


def compare_runs(before: Sequence[Row], now: Sequence[Row]) -> Verdict:
    """Look for the first row in which two runs differ.

    Args:
        before: rows with a ``step`` and metrics; those of the earlier run that were kept.
        now: rows of the later one; further steps in it do not count.
    """
    found: dict[tuple[int, bool], Row] = {(row["step"], _is_evaluation(row)): row for row in comparable(now)}
    worst: tuple[float, int, str, float | None, float | None] | None = None
    kept = comparable(before)
    for row in kept:
        other = found.get((row["step"], _is_evaluation(row)), {})
        apart = [(_distance(name, value, other.get(name)), name) for name, value in row.items() if name != "step"]
        distance, name = max(apart, default=(0.0, ""))
        if distance and (worst is None or distance > worst[0]):
            worst = distance, row["step"], name, row[name], other.get(name)
        if distance > 1:
            break
    if worst is None:
        return Verdict(kind="equal", steps=len(kept))
    distance, step, name, first, second = worst
    kind: Literal["within rounding", "different"] = "different" if distance > 1 else "within rounding"
    return Verdict(kind=kind, steps=len(kept), step=step, metric=name, before=first, now=second)


def _is_evaluation(row: Row) -> bool:
    """A step may have a row of training and one of held-out data."""
    return any(name.startswith("eval/") for name in row)


def _distance(name: str, first: Any, second: Any) -> float:
    """How far two values of a metric are apart, in what rounding may make."""
    if first == second:
        return 0.0
    if not isinstance(first, int | float) or not isinstance(second, int | float):
        return math.inf
    smallest = 0.0 if name.endswith(SMALL_BY_NATURE) else ABSOLUTE
    return abs(first - second) / (smallest + RELATIVE * max(abs(first), abs(second)))
