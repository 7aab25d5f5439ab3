"""What labels look like, given features: heads in folds, their margins, the mixture of them.

Arrays in, arrays out: no ranks, no files, no model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reward.audit.margins import EFFECTS, STRENGTHS, Differences, folds_of
from reward.audit.mixture import Array, Interval, fit_mixture, posterior_wrong, share_interval

CHOOSING = 999
"""The repeat whose folds the strength of the penalty is chosen by."""


@dataclass(frozen=True, kw_only=True)
class OutOfFold:
    """Pairs as features, with the way they are cut into folds."""

    differences: Differences
    prompts: NDArray[np.uint64]
    """``(N,)`` equal for pairs of the same prompt."""
    groups: NDArray[np.uint64]
    """``(N,)`` equal for pairs that are in the same fold: :attr:`prompts`, or a name for the two answers."""
    labels: Array | None = None
    """``(N,)`` -1 where the label is to be swapped, else 1; ``None`` for all as they are given."""
    folds: int = 5
    seed: int = 0

    @property
    def effects(self) -> tuple[float, ...]:
        """Variances of answers' own worth that are tried, each with all strengths of the heads' penalty."""
        return EFFECTS if self.differences.shares_answers else EFFECTS[:1]

    def heads(self, repeats: int) -> int:
        """How many heads :func:`audited` fits."""
        return self.folds * (len(STRENGTHS) * len(self.effects) + repeats)

    def margins(
        self,
        strengths: Sequence[float],
        effect: float,
        repeat: int,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Array:
        """``(S, N)`` margins by the folds of this repeat, for each strength of the penalty."""
        fold_of = folds_of(self.groups, self.folds, self.seed * 1000 + repeat)
        labels = np.ones(len(self.groups)) if self.labels is None else self.labels
        return self.differences.out_of_fold_margins(fold_of, strengths, effect, labels, advance=advance)


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What the labels of N pairs look like."""

    margins: Array
    """``(N,)`` mean over repeats."""
    spread: Array
    """``(N,)`` standard deviation over repeats."""
    wrong: Array
    """``(N,)`` posterior that the label is wrong."""
    interval: Interval
    """The share of wrong labels."""
    temperature: float
    strength: float | None
    """The penalty of the heads; ``None`` for judges that have none."""
    effect: float | None
    """The variance of the answers' own worth; likewise."""


def audited(pairs: OutOfFold, *, repeats: int = 4, advance: Callable[[int], None] = lambda count: None) -> Audited:
    """Margins of every pair from ``repeats`` ways to cut the pairs, and what the mixture of their means says."""
    margins, spread, settings = judged(pairs, repeats=repeats, advance=advance)
    return from_margins(margins, spread, pairs.prompts, pairs.seed, settings)


def from_margins(
    margins: Array,
    spread: Array,
    prompts: NDArray[np.uint64],
    seed: int,
    settings: tuple[float | None, float | None] = (None, None),
) -> Audited:
    """What ``(N,)`` margins with their spread over repeats say, whoever judged; ``settings`` are those of the heads."""
    fitted = fit_mixture(margins)
    interval = share_interval(margins, prompts, seed=seed)
    strength, effect = settings
    return Audited(
        margins=margins,
        spread=spread,
        wrong=posterior_wrong(margins, fitted.share, fitted.temperature),
        interval=Interval(
            share=fitted.share, low=min(interval.low, fitted.share), high=max(interval.high, fitted.share)
        ),
        temperature=fitted.temperature,
        strength=strength,
        effect=effect,
    )


def judged(
    pairs: OutOfFold, *, repeats: int = 4, advance: Callable[[int], None] = lambda count: None
) -> tuple[Array, Array, tuple[float, float]]:
    """``(N,)`` mean margins over repeats, their ``(N,)`` standard deviations, and the settings of the heads.

    The settings are those whose heads make the labels that they did not see most likely.
    """
    likelihoods = {}
    for effect in pairs.effects:
        for strength, margins in zip(STRENGTHS, pairs.margins(STRENGTHS, effect, CHOOSING, advance), strict=True):
            likelihoods[strength, effect] = fit_mixture(margins).log_likelihood
    strength, effect = max(sorted(likelihoods), key=likelihoods.__getitem__)
    found = np.concatenate([pairs.margins((strength,), effect, repeat, advance) for repeat in range(repeats)])
    return found.mean(0), found.std(0), (strength, effect)
