r"""Whether one variant is better than another, from differences by seed and by prompt, and what would decide it.

Pure: numpy and scipy. Runs differ by chance in two ways that cross each other: the seed of a run, and the prompts that
it is judged on. A difference is modeled as

    d_sg = difference + seed_s + prompt_g + rest_sg

and its mean over S seeds and G prompts has an interval that counts both.

References:
    Owen (2007), The pigeonhole bootstrap: resampling rows and columns of a crossed table.
    Rao and Wu (1988), Resampling inference with complex survey data: one unit fewer in each draw makes the variance
    right where there are few of them.
    Satterthwaite (1946), An approximate distribution of estimates of variance components.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE, POWER = 0.95, 0.8
DRAWS = 2000
SEED_LADDER = (3, 5, 10, 20, 50, 100)
MOST_PROMPTS = 1_000_000
CELLS = 1_000_000
"""Counts of prompts that are drawn at once."""
ROUNDING = 1e-12
"""Differences that vary by less than this part of them are equal."""
RESTS = 3
"""Times that a two-way bootstrap counts the rest, by seed, prompt and cell: it errs on the wide side."""

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A difference of two variants, with what is known of its error."""

    difference: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    seeds: int
    prompts: int
    seed_variance: float
    """Variance of the differences from seed to seed, less what chance among prompts makes of it."""
    prompt_variance: float
    rest_variance: float
    detectable: float
    """The smallest true difference that so many seeds and prompts show in 80 of 100 studies."""

    @property
    def is_certain(self) -> bool:
        """Whether nothing varies: all differences are one, and chance has left no trace to measure it by."""
        return self.low == self.high

    @property
    def is_decided(self) -> bool:
        return not self.is_certain and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Design:
    """Seeds and prompts of a study."""

    seeds: int
    prompts: int


def group_means(values: Array, weights: Array, groups: NDArray[np.int64]) -> tuple[Array, Array]:
    """``(S, G)`` weighted means of ``(S, N)`` differences by prompt, and the ``(G,)`` weights of the prompts.

    Args:
        values: one row a seed, one column an item.
        weights: ``(N,)`` of the items.
        groups: ``(N,)`` numbers from 0 to G - 1: items of one prompt are no independent evidence.
    """
    totals = np.bincount(groups, weights)
    sums = np.stack([np.bincount(groups, weights * row) for row in values])
    return sums / totals, totals.astype(float)


def compare(values: Array, weights: Array, *, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """The mean of ``(S, G)`` differences by seed and prompt, with a two-way bootstrap for its error.

    Each draw takes S - 1 seeds and G - 1 prompts, with replacement. The interval is the mean, and to both sides a
    quantile of Student's t times the deviation of the draws, with degrees of freedom from the parts that seeds and
    prompts have in it. With a single seed, all that is said is about that seed.

    Args:
        values: differences.
        weights: ``(G,)`` of the prompts.
        seed: of the draws.
        draws: number of them.
    Raises:
        ValueError: with fewer than two prompts, or for values that are not finite.
    """
    count, prompts = values.shape
    if prompts < 2:
        raise ValueError(f"{prompts} prompt: at least two are needed to tell chance from a difference")
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        raise ValueError("differences and weights must be finite")
    share = weights / weights.mean()
    difference = float((values * share).mean())
    # The ratio of weighted sums, linearized: each prompt's part in the error.
    parts = (values - difference) * share
    seed_part, prompt_part, rest = _components(parts)
    spread = math.sqrt(_bootstrap_variance(parts, np.random.default_rng(seed), draws))
    if np.abs(parts).max() <= ROUNDING * np.abs(values * share).max():
        spread = 0.0  # what varies is how sums are rounded
    freedom = _freedom(parts)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * spread
    power = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) + stats.t.ppf(POWER, freedom))
    return Comparison(
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        seeds=count,
        prompts=prompts,
        seed_variance=seed_part,
        prompt_variance=prompt_part,
        rest_variance=rest,
        detectable=power * spread,
    )


def _bootstrap_variance(parts: Array, generator: np.random.Generator, draws: int) -> float:
    count, prompts = parts.shape
    seeds_drawn, at_once = max(1, count - 1), max(1, CELLS // prompts)
    means: list[float] = []
    while len(means) < draws:
        size = min(at_once, draws - len(means))
        of_seeds = generator.multinomial(seeds_drawn, np.full(count, 1 / count), size)
        of_prompts = generator.multinomial(prompts - 1, np.full(prompts, 1 / prompts), size)
        sums = (of_seeds @ parts * of_prompts).sum(axis=1)
        means += (sums / (seeds_drawn * (prompts - 1))).tolist()
    return float(np.var(means))


def _one_way_variances(parts: Array) -> tuple[float, float]:
    """Variance of the mean from seeds alone, and from prompts alone."""
    count, prompts = parts.shape
    of_seeds = float(parts.mean(axis=1).var(ddof=1)) / count if count > 1 else 0.0
    return of_seeds, float(parts.mean(axis=0).var(ddof=1)) / prompts


def _components(parts: Array) -> tuple[float, float, float]:
    """Variances of seeds, prompts and rest: the analysis of variance of a crossed table with one value a cell."""
    count, prompts = parts.shape
    by_prompt = parts.mean(axis=0)
    if count == 1:
        return 0.0, float(by_prompt.var(ddof=1)), 0.0
    by_seed = parts.mean(axis=1)
    left = parts - by_seed[:, None] - by_prompt + parts.mean()
    rest = float((left**2).sum() / ((count - 1) * (prompts - 1)))
    seeds = float(by_seed.var(ddof=1)) - rest / prompts
    return max(0.0, seeds), max(0.0, float(by_prompt.var(ddof=1)) - rest / count), rest


def _freedom(parts: Array) -> float:
    """Satterthwaite's degrees of freedom of the variance of the mean."""
    count, prompts = parts.shape
    of_seeds, of_prompts = _one_way_variances(parts)
    if of_prompts + of_seeds == 0:
        return float(prompts - 1)
    below = of_prompts**2 / (prompts - 1) + (of_seeds**2 / (count - 1) if count > 1 else 0.0)
    return (of_prompts + of_seeds) ** 2 / below


def deciding_design(found: Comparison, smallest: float) -> Design | None:
    """The fewest seeds of a ladder, with the prompts they need, that show a true difference of ``smallest``.

    It is shown in 80 of 100 studies. ``None`` if no reasonable number of seeds and prompts does, or if there was one
    seed alone, which says nothing of others.
    """
    if found.seeds < 2:
        return None
    for seeds in sorted({*(count for count in SEED_LADDER if count >= found.seeds), found.seeds}):
        freedom = max(1, seeds - 1)
        quantiles = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) + stats.t.ppf(POWER, freedom))
        left = (smallest / quantiles) ** 2 - found.seed_variance / seeds
        if left <= 0:
            continue
        prompts = math.ceil((found.prompt_variance + RESTS * found.rest_variance / seeds) / left)
        if prompts <= MOST_PROMPTS:
            return Design(seeds=seeds, prompts=max(2, prompts))
    return None
