"""Variants compared with a baseline on the same items, and one line for each comparison. Plain rows in, records out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launch.study.statistics import Comparison, compare, deciding_design, group_means


@dataclass(frozen=True, kw_only=True)
class Item:
    """One held-out item of one run."""

    prompt: str
    value: float
    weight: float


Seed = int | str
Runs = Mapping[tuple[str, Seed], Mapping[str, Item]]
"""Items by row, of each run by variant and seed."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What variants are compared by."""

    item: str
    """What counts, in words, with a unit."""
    is_share: bool
    """Values are shares: shown as percentages, and their differences as points."""
    better: Literal["higher", "lower", "neither"]
    """neither: nobody knows which."""
    smallest: float
    """The smallest difference that would matter."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A variant beside the baseline."""

    variant: str
    baseline: str
    part: str
    """The part of the results; empty where there is one."""
    seeds: tuple[Seed, ...]
    """Those that both have finished."""
    items: int
    """Those that all of these runs have."""
    dropped: int
    """Those that only some of them have: they count for nothing."""
    found: Comparison | None
    """``None`` where there is nothing to compare."""
    verdict: str
    """One line."""


def compared(
    runs: Runs, variant: str, baseline: str, seeds: Sequence[Seed], measure: Measure, part: str = ""
) -> Compared:
    """Compare one variant, over the seeds that both have, on the items that all of these runs have."""
    both = tuple(seed for seed in seeds if (variant, seed) in runs and (baseline, seed) in runs)
    which = f"{part + ': ' if part else ''}{variant} against {baseline}"
    rows = [runs[name, seed].keys() for name in (variant, baseline) for seed in both]
    order = sorted(set[str]().intersection(*rows) if not rows else set(rows[0]).intersection(*rows[1:]))
    dropped = len(set[str]().union(*rows)) - len(order)
    found, verdict = None, f"{which}: nothing to compare yet: no seed is finished in both."
    if both and not order:
        verdict = f"{which}: nothing to compare: their runs share no held-out item."
    elif both:
        values = np.array(
            [[runs[variant, seed][row].value - runs[baseline, seed][row].value for row in order] for seed in both]
        )
        first = runs[baseline, both[0]]
        weights = np.array([first[row].weight for row in order])
        groups = np.unique([first[row].prompt for row in order], return_inverse=True)[1]
        if groups.max() < 1:
            verdict = f"{which}: nothing to compare: all held-out items have one prompt."
        else:
            found = compare(*group_means(values, weights, groups))
            verdict = _verdict(found, which, len(order), dropped, measure)
    return Compared(
        variant=variant,
        baseline=baseline,
        part=part,
        seeds=both,
        items=len(order),
        dropped=dropped,
        found=found,
        verdict=verdict,
    )


def _verdict(found: Comparison, which: str, items: int, dropped: int, measure: Measure) -> str:
    """Better, worse, or undecided with what would decide it."""

    def number(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.3g}" if measure.is_share else f"{value:{sign}.3g}"

    def amount(value: float, sign: str = "") -> str:
        shown = number(value, sign)
        return f"{shown} point{'' if shown == '1' else 's'}" if measure.is_share else shown

    of_prompts = "" if items == found.prompts else f"{items} items of "
    counts = f"{found.seeds} seed{'s' * (found.seeds > 1)}, {of_prompts}{found.prompts} prompts"
    if dropped:
        counts += f"; {dropped} item{'s' * (dropped > 1)} that not all of these runs have left out"
    if found.is_certain:
        said = "no difference, on any item" if found.difference == 0 else (
            "undecided: the difference is the same on every item, which tells nothing of chance"
        )  # fmt: skip
        return f"{which}: {measure.item} {amount(found.difference, '+')} ({counts}): {said}."
    interval = f"95 % interval {number(found.low, '+')} to {number(found.high, '+')}"
    line = f"{which}: {measure.item} {amount(found.difference, '+')} ({interval}; {counts}):"
    only = "" if found.seeds > 1 else " With one seed this says nothing of other seeds."
    if found.is_decided and measure.better == "neither":
        return f"{line} {'higher' if found.difference > 0 else 'lower'}.{only}"  # which of a KL, say, is no merit
    if found.is_decided:
        return f"{line} {'better' if (found.difference > 0) == (measure.better == 'higher') else 'worse'}.{only}"
    smallest, design = measure.smallest, deciding_design(found, measure.smallest)
    line += f" undecided. So many cannot show less than {amount(found.detectable)}"
    if found.detectable <= smallest:
        return f"{line}: a difference of {amount(smallest)} would have been seen.{only}"
    if design is not None:
        return f"{line}; {design.seeds} seeds and {design.prompts:,} prompts would show {amount(smallest)}."
    if found.seeds == 1:
        return f"{line}; with several seeds the study could say what would show {amount(smallest)}.{only}"
    return f"{line}; no reasonable number of seeds and prompts would show {amount(smallest)}."


def mean(items: Mapping[str, Item]) -> float | None:
    """The weighted mean; ``None`` of nothing."""
    if not items:
        return None
    weights = [item.weight for item in items.values()]
    return float(np.average([item.value for item in items.values()], weights=weights))
