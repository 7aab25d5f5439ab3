"""What a benchmark found: numbers with intervals beside what length alone, or another prompt, would give."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import TypeAdapter
from rich.table import Table

from reward.benchmarks.formulas import FORMULAS, Array, Measure, Scored, measure
from reward.evaluate import Evaluation, evaluate_held_out
from rlhf.core.findings import read_findings

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of the rewards that are reported."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """One model on one benchmark."""

    benchmark: str
    model: str
    """Its folder."""
    source: str
    """Where the benchmark's formula is published."""
    items: int
    measures: tuple[Measure, ...]
    """Numbers by the published formula, the main one first."""
    by_length: tuple[Measure, ...]
    """The same formula where the longer answer gets the higher score."""
    wrong_prompt: tuple[Measure, ...]
    """The same formula on scores under another item's prompt; empty if that was not asked for."""
    pairs: Evaluation
    """All (right, wrong) pairs of answers: calibration, accuracy by length difference and by gap of an annotator's
    scores."""
    quantiles: dict[str, float]
    """Rewards of all answers at :data:`SHARES`."""
    notes: tuple[str, ...]
    """What a reader should know: texts that were cut, rows that were left out."""

    @property
    def main(self) -> Measure:
        return self.measures[0]


def summarize(
    name: str,
    model: str,
    items: Sequence[Scored],
    *,
    lengths: Sequence[Array],
    elsewhere: Sequence[Array] | None,
    annotated: Sequence[Sequence[float] | None] | None = None,
    notes: Sequence[str] = (),
) -> BenchmarkResult:
    """All that is reported of the scores of a benchmark's items.

    Args:
        name: of :data:`reward.benchmarks.formulas.FORMULAS`.
        model: its name.
        items: all items with their scores.
        lengths: ``(n,)`` tokens of each item's answers, in their order.
        elsewhere: ``(n,)`` scores of each item's answers under another prompt; ``None`` if there are none.
        annotated: ``(n,)`` scores of an annotator for each item's answers, ``None`` for an item without them.
        notes: what a reader should know.
    Raises:
        ValueError: without items, or if a score is not finite.
    """
    formula = FORMULAS[name]
    rewards = [item.scores for item in items]
    known = [None] * len(items) if annotated is None else annotated
    scores = [np.full(len(item.scores), np.nan) if own is None else own for item, own in zip(items, known, strict=True)]
    chosen, rejected = _of_pairs(items, rewards).T
    return BenchmarkResult(
        benchmark=name,
        model=model,
        source=formula.source,
        items=len(items),
        measures=measure(formula, items),
        by_length=measure(formula, _rescored(items, lengths)),
        wrong_prompt=() if elsewhere is None else measure(formula, _rescored(items, elsewhere)),
        pairs=evaluate_held_out(chosen, rejected, lengths=_of_pairs(items, lengths), scores=_of_pairs(items, scores)),
        quantiles={f"{share:.0%}": float(np.quantile(np.concatenate(rewards), share)) for share in SHARES},
        notes=tuple(notes),
    )


def _rescored(items: Sequence[Scored], scores: Sequence[Array]) -> list[Scored]:
    return [replace(item, scores=np.asarray(own, float)) for item, own in zip(items, scores, strict=True)]


def _of_pairs(items: Sequence[Scored], values: Sequence[ArrayLike]) -> Array:
    """``(N, 2)`` values of the right and the wrong answer of all pairs of such answers."""
    pairs = []
    for item, own in zip(items, values, strict=True):
        both = np.asarray(own, float)
        right, wrong = both[: item.right], both[item.right :]
        pairs.append(np.column_stack([np.repeat(right, len(wrong)), np.tile(wrong, len(right))]))
    return np.concatenate(pairs)


# Files and tables


def to_dict(result: BenchmarkResult) -> dict[str, Any]:
    """Nested dicts, lists and numbers, ready for JSON."""
    return asdict(result) | {"pairs": result.pairs.to_dict()}


def read_result(folder: Path) -> BenchmarkResult:
    """What a run of the benchmark stage wrote into ``folder``."""
    return TypeAdapter(BenchmarkResult).validate_python(read_findings(folder))


def report_of(folder: Path) -> Table:
    """The table of a benchmark that is finished, from its run folder."""
    return benchmark_table(read_result(folder))


def benchmark_table(result: BenchmarkResult) -> Table:
    """One line a number, in percent; "length" is what the longer answer would get."""
    title = f"{result.benchmark}: {result.model} ({result.items} items; {result.source})"
    table = Table(title=title, title_justify="left")
    headings, rows = _cells(result)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=heading != headings[0])
    for row in rows:
        table.add_row(*row)
    return table


def markdown(result: BenchmarkResult) -> str:
    """The table with a title, and the notes."""
    headings, rows = _cells(result)
    lines = [f"# {result.benchmark}: {result.model}", "", f"{result.items} items. Formula: {result.source}.", ""]
    lines += ["| " + " | ".join(headings) + " |", "|---" + "|--:" * (len(headings) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *result.notes] if result.notes else []
    return "\n".join(lines) + "\n"


def _cells(result: BenchmarkResult) -> tuple[list[str], list[list[str]]]:
    headings = [
        "measure, %",
        "value",
        "95 % interval",
        "length",
        *(["wrong prompt"] if result.wrong_prompt else []),
        "n",
    ]
    rows = []
    for place, each in enumerate(result.measures):
        others = [column[place] for column in (result.by_length, result.wrong_prompt) if column]
        interval = f"{each.low:.1%} to {each.high:.1%}".replace("%", "")
        numbers = [f"{100 * each.value:.1f}", interval, *(f"{100 * other.value:.1f}" for other in others)]
        rows.append([each.name, *numbers, str(each.items)])
    return headings, rows
