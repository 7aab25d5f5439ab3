"""What the finished runs of a study came to: one tidy file, paired differences, and a verdict for each comparison."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.pipeline.state import Action, Progress
from launch.report.contents import share
from launch.report.reading import read_lines
from launch.study.recipe import VALUE, Study
from launch.study.statistics import Comparison, compare, deciding_design, group_means
from rlhf.core.errors import UserError
from rlhf.core.files import write_json, write_text
from rlhf.train.held_out import HELD_OUT

ACCURACY = "accuracy"
HEADINGS = ("variant", "seed", "row", "prompt", "value", "weight")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One held-out item of one run."""

    prompt: str
    value: float
    weight: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A variant beside the baseline."""

    variant: str
    baseline: str
    seeds: tuple[int, ...]
    """Those that both have finished."""
    items: int
    found: Comparison | None
    """``None`` where there is nothing to compare."""
    verdict: str
    """One line."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of a study."""

    study: Study
    items: Mapping[tuple[str, int], Mapping[str, Item]]
    """Items of each finished run, by row."""
    compared: tuple[Compared, ...]

    @property
    def is_share(self) -> bool:
        """Whether values are shares, shown as percentages and their differences as points."""
        return self.study.stage.item == ACCURACY and self.study.config.value == VALUE

    def mean(self, variant: str, seed: int) -> float | None:
        found = self.items.get((variant, seed))
        if not found:
            return None
        return _mean(list(found.values()))


def results_of(study: Study, *, any_code: bool = False) -> Results:
    """Read the runs that are finished with the present settings, inputs and code, and compare them.

    Raises:
        UserError: if a run has held-out items without the number that counts.
    """
    progress = Progress(study.pipeline, any_code=any_code, writes=False)
    items = {
        key: _items(run.output / HELD_OUT, study.config.value)
        for key, run in study.runs.items()
        if progress.decide(run).action is Action.SKIP
    }
    others = [variant for variant in study.config.variants if variant != study.baseline]
    found = Results(study=study, items=items, compared=())
    compared = tuple(_compared(study, items, variant, is_share=found.is_share) for variant in others)
    return Results(study=study, items=items, compared=compared)


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


def _mean(items: Sequence[Item]) -> float:
    weights = np.array([item.weight for item in items])
    return float(np.average([item.value for item in items], weights=weights))


def _compared(
    study: Study, items: Mapping[tuple[str, int], Mapping[str, Item]], variant: str, *, is_share: bool
) -> Compared:
    base = study.baseline
    seeds = tuple(seed for seed in study.config.seeds if (variant, seed) in items and (base, seed) in items)
    rows: set[str] = set()
    for place, seed in enumerate(seeds):
        both = items[variant, seed].keys() & items[base, seed].keys()
        rows = both if place == 0 else rows & both
    order = sorted(rows)
    found, verdict = None, f"{variant} against {base}: nothing to compare yet: no seed is finished in both."
    if seeds and not order:
        verdict = f"{variant} against {base}: nothing to compare: their runs share no held-out item."
    elif seeds:
        values = np.array(
            [[items[variant, seed][row].value - items[base, seed][row].value for row in order] for seed in seeds]
        )
        first = items[base, seeds[0]]
        weights = np.array([first[row].weight for row in order])
        groups = np.unique([first[row].prompt for row in order], return_inverse=True)[1]
        if groups.max() < 1:
            verdict = f"{variant} against {base}: nothing to compare: all held-out items have one prompt."
        else:
            found = compare(*group_means(values, weights, groups))
            verdict = _verdict(study, found, f"{variant} against {base}", len(order), is_share=is_share)
    return Compared(variant=variant, baseline=base, seeds=seeds, items=len(order), found=found, verdict=verdict)


def _verdict(study: Study, found: Comparison, which: str, items: int, *, is_share: bool) -> str:
    """Better, worse, or undecided with what would decide it."""

    def number(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.3g}" if is_share else f"{value:{sign}.3g}"

    def amount(value: float, sign: str = "") -> str:
        shown = number(value, sign)
        return f"{shown} point{'' if shown == '1' else 's'}" if is_share else shown

    lower_is_better = study.stage.metric.startswith("-")
    of_prompts = "" if items == found.prompts else f"{items} items of "
    counts = f"{found.seeds} seed{'s' * (found.seeds > 1)}, {of_prompts}{found.prompts} prompts"
    interval = f"95 % interval {number(found.low, '+')} to {number(found.high, '+')}"
    line = f"{which}: {study.judged_by} {amount(found.difference, '+')} ({interval}; {counts}):"
    only = "" if found.seeds > 1 else " With one seed this says nothing of other seeds."
    if found.is_decided and study.config.value != VALUE:
        return f"{line} {'higher' if found.difference > 0 else 'lower'}.{only}"  # which of a KL, say, is no merit
    if found.is_decided:
        return f"{line} {'better' if (found.difference > 0) != lower_is_better else 'worse'}.{only}"
    smallest, design = study.config.smallest, deciding_design(found, study.config.smallest)
    line += f" undecided. So many cannot show less than {amount(found.detectable)}"
    if found.detectable <= smallest:
        return f"{line}: a difference of {amount(smallest)} would have been seen.{only}"
    if design is not None:
        return f"{line}; {design.seeds} seeds and {design.prompts:,} prompts would show {amount(smallest)}."
    if found.seeds == 1:
        return f"{line}; with several seeds the study could say what would show {amount(smallest)}.{only}"
    return f"{line}; no reasonable number of seeds and prompts would show {amount(smallest)}."


# Files and tables


def tidy(results: Results) -> Iterator[tuple[Any, ...]]:
    """One row an item and run."""
    yield HEADINGS
    for (variant, seed), items in results.items.items():
        for row, item in items.items():
            yield variant, seed, row, item.prompt, item.value, item.weight


def headings_and_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table: a line a variant, with its mean and that of each seed."""
    seeds = results.study.config.seeds
    rows = []
    for variant in results.study.config.variants:
        means = [results.mean(variant, seed) for seed in seeds]
        known = [mean for mean in means if mean is not None]
        spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
        cells = [sum(known) / len(known) if known else None, spread, *means]
        rows.append([variant, *(_shown(value, results.is_share) for value in cells)])
    return ["variant", "mean", "deviation", *(f"seed {seed}" for seed in seeds)], rows


def _shown(value: float | None, is_share: bool) -> str:
    return "–" if value is None else share(value) if is_share else f"{value:.4g}"


def write_results(folder: Path, results: Results, failures: Mapping[str, str]) -> None:
    """Write ``results.csv``, ``study.json`` and ``study.md``; ``failures``: why, by run."""
    text = io.StringIO()
    csv.writer(text).writerows(tidy(results))
    write_text(folder / "results.csv", text.getvalue())
    headings, rows = headings_and_rows(results)
    study = results.study
    write_json(
        folder / "study.json",
        {
            "stage": study.stage.name,
            "metric": study.stage.key_metric,
            "item": study.judged_by,
            "is_share": results.is_share,
            "baseline": study.baseline,
            "variants": [
                {"name": variant, "runs": [run.name for (name, _), run in study.runs.items() if name == variant]}
                for variant in study.config.variants
            ],
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
    study = results.study
    yield from (f"# Study: {study.pipeline.name}", "")
    yield from (f"* {each.verdict}" for each in results.compared)
    yield ""
    for cells in (headings, ["---", *["---:"] * (len(headings) - 1)], *rows):
        yield f"| {' | '.join(cells)} |"
    yield from ("", f"Held-out {study.judged_by}, a line a variant. Every comparison has its own 95 % interval.", "")
    yield from (f"* failed: `{name}`: {' '.join(why.split())}" for name, why in failures.items())
