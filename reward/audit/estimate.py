"""What labels look like, given features: heads in folds, their margins, the mixture of them.

Arrays in, arrays out: no ranks, no files, no model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reward.audit.margins import Head, HeadTraining, out_of_fold_margins, prompt_folds
from reward.audit.mixture import Array, Interval, fit_mixture, posterior_wrong, share_interval


@dataclass(frozen=True)
class OutOfFold:
    """Pairs as features, with the way they are cut into folds."""

    chosen: Tensor
    """``(N, D)``."""
    rejected: Tensor
    """``(N, D)``."""
    prompts: NDArray[np.uint64]
    """``(N,)`` equal for pairs of the same prompt."""
    folds: int = 5
    seed: int = 0

    def margins(self, head: Head, repeat: int, advance: Callable[[int], None] = lambda count: None) -> Array:
        """``(N,)`` margins with folds, starts and order of this repeat."""
        seed = self.seed * 1000 + repeat
        fold_of = prompt_folds(self.prompts, self.folds, seed)
        return out_of_fold_margins(
            self.chosen, self.rejected, fold_of, HeadTraining(head=head), seed=seed, advance=advance
        )


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


def chosen_head(pairs: OutOfFold, advance: Callable[[int], None] = lambda count: None) -> Head:
    """The head whose margins make the labels of prompts that it did not see most likely."""
    likelihoods = {head: fit_mixture(pairs.margins(head, 999, advance)).log_likelihood for head in get_args(Head)}
    return max(likelihoods, key=lambda head: likelihoods[head])


def audited(
    pairs: OutOfFold, head: Head, *, repeats: int = 4, advance: Callable[[int], None] = lambda count: None
) -> Audited:
    """Margins of every pair from ``repeats`` ways to cut the prompts, and what the mixture of their means says."""
    each = np.stack([pairs.margins(head, repeat, advance) for repeat in range(repeats)])
    margins = each.mean(0)
    fitted = fit_mixture(margins)
    interval = share_interval(margins, pairs.prompts, seed=pairs.seed)
    return Audited(
        margins=margins,
        spread=each.std(0),
        wrong=posterior_wrong(margins, fitted.share, fitted.temperature),
        interval=Interval(
            share=fitted.share, low=min(interval.low, fitted.share), high=max(interval.high, fitted.share)
        ),
        temperature=fitted.temperature,
    )
