"""What a study came to: one tidy file, a table, paired differences, and a verdict for each comparison."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.pipeline.state import Action, Progress
from launch.report.contents import share
from launch.report.reading import read_lines
from launch.study.recipe import VALUE, Study
from launch.study.verdicts import Compared, Item, Measure, Runs, Seed, compared, mean
from rlhf.core.errors import UserError
from rlhf.core.files import write_json, write_text
from rlhf.train.held_out import HELD_OUT

ACCURACY = "accuracy"
PART = "part"
HEADINGS = ("variant", "seed", "row", "prompt", "value", "weight")


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of a study."""

    name: str
    measure: Measure
    baseline: str
    variants: tuple[str, ...]
    seeds: tuple[Seed, ...]
    parts: Mapping[str, Runs]
    """Runs by the part of the results; under an empty name where there is one part alone."""
    stage: str = ""
    metric: str = ""
    """The metric that is drawn along the runs; empty where there are no curves."""
    folders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Run folders below that of the study, by variant."""

    @property
    def compared(self) -> tuple[Compared, ...]:
        others = [variant for variant in self.variants if variant != self.baseline]
        return tuple(
            compared(runs, variant, self.baseline, self.seeds, self.measure, part)
            for part, runs in self.parts.items()
            for variant in others
            if not part or any(name == variant for name, _ in runs)
        )


def results_of(study: Study, *, any_code: bool = False) -> Results:
    """Read the runs that are finished with the present settings, inputs and code.

    Raises:
        UserError: if a run has held-out items without the number that counts.
    """
    progress = Progress(study.pipeline, any_code=any_code, writes=False)
    runs: dict[tuple[str, Seed], dict[str, Item]] = {
        key: _items(run.output / HELD_OUT, study.config.value)
        for key, run in study.runs.items()
        if progress.decide(run).action is Action.SKIP
    }
    is_main = study.config.value == VALUE
    lower = study.stage.metric.startswith("-")
    return Results(
        name=study.pipeline.name,
        measure=Measure(
            item=study.stage.item if is_main else study.config.value,
            is_share=is_main and study.stage.item == ACCURACY,
            better="neither" if not is_main else "lower" if lower else "higher",
            smallest=study.config.smallest,
        ),
        baseline=study.baseline,
        variants=tuple(study.config.variants),
        seeds=study.config.seeds,
        parts={"": runs},
        stage=study.stage.name,
        metric=study.stage.key_metric,
        folders={
            variant: [run.name for (name, _), run in study.runs.items() if name == variant]
            for variant in study.config.variants
        },
    )


def _items(path: Path, value: str) -> dict[str, Item]:
    rows, _ = read_lines(path)
    if not rows:
        raise UserError(f"{path}: no held-out items: nothing to compare the run by")
    missing = next((row for row in rows if not isinstance(row.get(value), int | float)), None)
    if missing is not None:
        numbers = sorted(name for name, each in missing.items() if isinstance(each, int | float))
        raise UserError(f"{path}: value = {value}: {missing['row']} has none; there are {', '.join(numbers)}")
    items: dict[str, Item] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["row"]] += 1
        # A line of the data may hold several pairs: always in this order.
        name = row["row"] if counts[row["row"]] == 1 else f"{row['row']} no. {counts[row['row']]}"
        items[name] = Item(prompt=row["group"], value=float(row[value]), weight=float(row.get("weight", 1.0)))
    return items


# Files and tables


def tidy(results: Results) -> Iterator[tuple[Any, ...]]:
    """One row an item and run."""
    has_parts = any(results.parts)
    yield ((PART, *HEADINGS) if has_parts else HEADINGS)
    for part, runs in results.parts.items():
        for (variant, seed), items in runs.items():
            for row, item in items.items():
                found = (variant, seed, row, item.prompt, item.value, item.weight)
                yield ((part, *found) if has_parts else found)


def headings_and_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table: a line a variant, with its mean and that of each seed."""
    rows = []
    for part, runs in results.parts.items():
        for variant in results.variants:
            means = [mean(runs.get((variant, seed), {})) for seed in results.seeds]
            known = [each for each in means if each is not None]
            spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
            cells = [sum(known) / len(known) if known else None, spread, *means]
            name = f"{part}: {variant}" if part else variant
            if known or not part:
                rows.append([name, *(_shown(value, results.measure.is_share) for value in cells)])
    return ["variant", "mean", "deviation", *(f"seed {seed}" for seed in results.seeds)], rows


def _shown(value: float | None, is_share: bool) -> str:
    return "–" if value is None else share(value) if is_share else f"{value:.4g}"


def write_results(folder: Path, results: Results, failures: Mapping[str, str]) -> None:
    """Write ``results.csv``, ``study.json`` and ``study.md``; ``failures``: why, by run."""
    text = io.StringIO()
    csv.writer(text).writerows(tidy(results))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.csv", text.getvalue())
    headings, rows = headings_and_rows(results)
    write_json(
        folder / "study.json",
        {
            "stage": results.stage,
            "metric": results.metric,
            "item": results.measure.item,
            "is_share": results.measure.is_share,
            "baseline": results.baseline,
            "variants": [{"name": name, "runs": list(runs)} for name, runs in results.folders.items()],
            "headings": headings,
            "rows": rows,
            "comparisons": [asdict(each) for each in results.compared],
            "failed": dict(failures),
        },
    )
    write_text(folder / "study.md", "\n".join(_markdown(results, headings, rows, failures)))


def _markdown(
    results: Results, headings: Sequence[str], rows: Sequence[Sequence[str]], failures: Mapping[str, str]
) -> Iterator[str]:
    yield from (f"# Study: {results.name}", "")
    yield from (f"* {each.verdict}" for each in results.compared)
    yield ""
    for cells in (headings, ["---", *["---:"] * (len(headings) - 1)], *rows):
        yield f"| {' | '.join(cells)} |"
    yield from (
        "",
        f"Held-out {results.measure.item}, a line a variant. Every comparison has its own 95 % interval.",
        "",
    )
    yield from (f"* failed: `{name}`: {' '.join(why.split())}" for name, why in failures.items())
