"""Estimates with their 95 % intervals: a mean, and the accuracy of decisions between two answers.

Plain arrays in, frozen records out.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval (Student's t over prompts)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of pairs decided for the chosen answer; a tie counts as half a pair."""

    value: float
    low: float
    """Lower end of the 95 % Wilson interval."""
    high: float
    """Upper end of the 95 % Wilson interval."""
    pairs: int
    ties: int


def mean_with_interval(values: NDArray[np.float64]) -> Estimate:
    """The mean of ``(N,)`` independent values; its interval is the mean itself where they do not vary."""
    from scipy import stats  # here, as it takes long to import and few commands need it

    mean = float(values.mean())
    if len(values) < 2 or values.std() == 0:
        return Estimate(value=mean, low=mean, high=mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=stats.sem(values))
    return Estimate(value=mean, low=float(low), high=float(high))


def preference_accuracy(gap: ArrayLike) -> Accuracy:
    """Accuracy of the sign of ``gap`` ``(N,)``: positive is right, zero is a tie and counts half."""
    gap = np.asarray(gap)
    ties = int((gap == 0).sum())
    right = float((gap > 0).sum()) + ties / 2
    low, high = wilson_interval(right, len(gap))
    return Accuracy(value=right / len(gap), low=low, high=high, pairs=len(gap), ties=ties)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, without continuity correction; (0, 1) without a trial.

    Written out, not taken from ``scipy.stats.binomtest``, because ties make ``successes`` a half-integer.

    References:
        Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials; got {successes} of {trials}")
    if trials == 0:
        return 0.0, 1.0
    z_squared = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    share = successes / trials
    center = share + z_squared / (2 * trials)
    half_width = (z_squared * (share * (1 - share) / trials + z_squared / (4 * trials**2))) ** 0.5
    scale = 1 + z_squared / trials
    return max(0.0, (center - half_width) / scale), min(1.0, (center + half_width) / scale)
