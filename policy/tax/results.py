"""What a task says of two models: both values, and the mean difference for the same items with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from rich.table import Table

from rlhf.core.findings import read_findings
from rlhf.core.intervals import Estimate, mean_with_interval

STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class TaskTax:
    """One measure of one task, before and after."""

    task: str
    measure: str
    """The name that lm-eval has for it, such as acc or exact_match."""
    before: float
    after: float
    """Both by lm-eval."""
    change: Estimate | None
    """The value after, less that before, for the same items; ``None`` where the measure is no mean over items."""
    higher_is_better: bool | None
    """``None`` where lm-eval does not say."""
    items: int

    @property
    def verdict(self) -> str:
        """What the change says: a cost, a gain, or nothing."""
        if (
            self.change is None
            or self.higher_is_better is None
            or self.change.low <= 0 <= self.change.high
            or self.change.low == self.change.high
        ):
            return "undecided"
        return "gain" if (self.change.low > 0) == self.higher_is_better else "cost"


@dataclass(frozen=True, kw_only=True)
class Tax:
    """All tasks."""

    before: str
    after: str
    tasks: tuple[TaskTax, ...]


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[TaskTax], list[dict[str, Any]]]:
    """Every measure of every task, and a row for each item.

    Args:
        before: what ``lm_eval.simple_evaluate`` gives with its samples.
        after: the same of the other model.
    """
    tasks, rows = [], []
    for task, samples in before["samples"].items():
        for key in before["results"][task]:
            measure, comma, way = key.partition(",")
            if not comma or measure.endswith(STDERR):
                continue
            values = [_by_item(each["samples"][task], measure, way) for each in (before, after)]
            means = [float(each["results"][task][key]) for each in (before, after)]
            both = [item for item in values[0] if item in values[1]]
            pairs = np.array([[values[0][item], values[1][item]] for item in both]).reshape(-1, 2)
            is_mean = len(both) > 0 and bool(np.allclose(pairs.mean(axis=0), means, atol=1e-6))
            tasks.append(
                TaskTax(
                    task=task,
                    measure=measure if way == "none" else f"{measure} ({way})",
                    before=means[0],
                    after=means[1],
                    change=mean_with_interval(pairs[:, 1] - pairs[:, 0]) if is_mean else None,
                    higher_is_better=before["higher_is_better"].get(task, {}).get(measure),
                    items=len({sample["doc_id"] for sample in samples}),
                )
            )
            for item, (was, now) in zip(both, pairs.tolist(), strict=True):
                name = tasks[-1].measure
                rows.append({"id": f"{task}/{item}", "task": task, "measure": name, "before": was, "after": now})
    return tasks, rows


def _by_item(samples: Sequence[Mapping[str, Any]], measure: str, way: str) -> dict[int, float]:
    """What each item has of a measure that is a number for each."""
    return {
        sample["doc_id"]: float(sample[measure])
        for sample in samples
        if sample.get("filter", "none") == way and isinstance(sample.get(measure), bool | int | float | np.number)
    }


def read_tax(folder: Path) -> Tax:
    """What a run of the tax stage wrote into ``folder``."""
    return TypeAdapter(Tax).validate_python(read_findings(folder))


def report_of(folder: Path) -> Table:
    """The table of a tax that is finished, from its run folder."""
    return tax_table(read_tax(folder))


def tax_table(found: Tax) -> Table:
    """A line a measure of a task."""
    table = Table(title=f"{found.after} after, {found.before} before", title_justify="left")
    for name in ("task", "measure", "before", "after", "change", "95 % interval", "n", ""):
        table.add_column(name, justify="left" if name in ("task", "measure", "") else "right")
    for each in found.tasks:
        change = each.change
        interval = "" if change is None else f"{change.low:+.4f} to {change.high:+.4f}"
        numbers = [f"{each.before:.4f}", f"{each.after:.4f}", f"{each.after - each.before:+.4f}", interval]
        table.add_row(each.task, each.measure, *numbers, str(each.items), each.verdict)
    return table
