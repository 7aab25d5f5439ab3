"""What grades came to: means with intervals by model, turn and category, and differences for the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from rich.table import Table

from policy.grading.questions import BEST, WORST
from rlhf.core.findings import read_findings
from rlhf.core.intervals import Estimate, mean_with_interval

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""MT-Bench's, in the order of its plots; others come behind them."""


@dataclass(frozen=True, kw_only=True)
class ModelGrades:
    """The grades of one model."""

    name: str
    score: Estimate
    """Mean over questions of the mean over their turns, with a 95 % interval over questions."""
    by_turn: tuple[Estimate, ...]
    by_category: dict[str, Estimate]
    """Empty where the questions have no categories."""
    gain: Estimate | None
    """Score less that of the first model, for the same questions; ``None`` for the first one itself."""
    questions: int
    left_out: int
    """Questions of which a turn has no grade; they count for nothing."""


@dataclass(frozen=True, kw_only=True)
class Grading:
    """All of a grading."""

    judge: str
    models: tuple[ModelGrades, ...]
    notes: tuple[str, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """Those of the questions, MT-Bench's in its order."""
        named = self.models[0].by_category.keys()
        return (*(each for each in CATEGORIES if each in named), *sorted(named - {*CATEGORIES}))


GradesOf = Mapping[str, Sequence[float]]
"""Grades of the turns by question."""


def summarize(
    judge: str, grades: Mapping[str, GradesOf], categories: Mapping[str, str], asked: int, notes: tuple[str, ...]
) -> Grading:
    """Means and intervals.

    Args:
        judge: its name.
        grades: by model, of all questions whose turns all have one.
        categories: of the questions.
        asked: questions.
        notes: what a reader should know.
    """
    first: GradesOf | None = None
    models = []
    for name, own in grades.items():
        means = {key: float(np.mean(turns)) for key, turns in own.items()}
        both = [] if first is None else [means[key] - float(np.mean(first[key])) for key in own if key in first]
        named = sorted({categories[key] for key in own} - {""})
        models.append(
            ModelGrades(
                name=name,
                score=_graded([*means.values()]),
                by_turn=_by_turn([*own.values()]),
                by_category={each: _graded([means[key] for key in own if categories[key] == each]) for each in named},
                gain=mean_with_interval(np.array(both)) if both else None,
                questions=asked,
                left_out=asked - len(own),
            )
        )
        first = own if first is None else first
    return Grading(judge=judge, models=tuple(models), notes=notes)


def _by_turn(grades: Sequence[Sequence[float]]) -> tuple[Estimate, ...]:
    count = max(map(len, grades))
    return tuple(_graded([turns[turn] for turns in grades if len(turns) > turn]) for turn in range(count))


def _graded(grades: Sequence[float]) -> Estimate:
    """Mean and interval, within the scale: of few questions it would reach beyond."""
    found = mean_with_interval(np.array(grades))
    return Estimate(value=found.value, low=max(WORST, found.low), high=min(BEST, found.high))


def read_grading(folder: Path) -> Grading:
    """What a run of the grading stage wrote into ``folder``."""
    return TypeAdapter(Grading).validate_python(read_findings(folder))


def report_of(folder: Path) -> Table:
    """The table of a grading that is finished, from its run folder."""
    return grades_table(read_grading(folder))


def grades_table(found: Grading) -> Table:
    """A line a measure, a column a model."""
    counts = ", ".join(f"{each.questions - each.left_out}" for each in found.models)
    table = Table(title=f"Grades 1 to 10 by {found.judge} ({counts} questions, 95 % intervals)", title_justify="left")
    table.add_column("measure")
    for each in found.models:
        table.add_column(each.name, justify="right")
    table.add_row("score", *(_shown(each.score) for each in found.models))
    if len(found.models) > 1:
        table.add_row(f"gain over {found.models[0].name}", *(_shown(each.gain, "+") for each in found.models))
    turns = max(len(each.by_turn) for each in found.models)
    for turn in range(turns if turns > 1 else 0):
        table.add_row(f"turn {turn + 1}", *(_shown(each.by_turn[turn]) for each in found.models))
    for category in found.categories:
        table.add_row(category, *(_shown(each.by_category.get(category)) for each in found.models))
    return table


def _shown(value: Estimate | None, sign: str = "") -> str:
    return "" if value is None else f"{value.value:{sign}.2f} ({value.low:{sign}.2f} to {value.high:{sign}.2f})"
