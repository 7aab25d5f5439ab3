"""Margins of pairs by linear heads that did not see them: fitted to frozen features, fold by fold."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from reward.audit.mixture import Array

STRENGTHS = (0.3, 1.0, 3.0, 10.0)
"""Strengths of the ridge penalty that are tried, in units of the mean squared feature of all pairs together."""


def folds_of(groups: NDArray[np.uint64], folds: int, seed: int) -> NDArray[np.int64]:
    """``(N,)`` fold of each pair: all pairs of a group share one, and folds have about as many pairs.

    Args:
        groups: ``(N,)`` equal for pairs that are judged by the same heads: those of a prompt, or the same answers.
        folds: how many.
        seed: of the order in which groups are dealt out.
    Raises:
        ValueError: if there are fewer groups than folds.
    """
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < folds:
        raise ValueError(f"{len(names)} groups make no {folds} folds")
    sizes = np.bincount(members)
    order = np.random.default_rng((seed, 0)).permutation(len(names))
    fold_of, filled = np.zeros(len(names), np.int64), np.zeros(folds, np.int64)
    for name in order:  # the emptiest fold next
        fold_of[name] = filled.argmin()
        filled[fold_of[name]] += sizes[name]
    return fold_of[members]


@dataclass(frozen=True)
class Differences:
    """What a linear head reads of N pairs: features of chosen minus those of rejected, each of unit spread."""

    values: Array
    """``(N, D)``."""

    @classmethod
    def of(cls, chosen: Array, rejected: Array) -> "Differences":
        """The differences of ``(N, D)`` features of the answers."""
        spread = np.concatenate([chosen, rejected]).std(0, dtype=np.float64)
        return cls((chosen - rejected) / np.maximum(spread, 1e-6))

    @cached_property
    def _gram(self) -> Array:
        return self.values.T @ self.values

    def out_of_fold_margins(
        self,
        fold_of: NDArray[np.int64],
        strength: float,
        labels: Array,
        *,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Array:
        r"""``(N,)`` reward gaps of pairs, each by the head that was fitted to all other folds.

            m_i = y_i x_i . w_f,   w_f = argmin sum over the pairs j outside of fold f of (1 - y_j x_j . w)^2
                                          + strength trace(X^T X) / D |w|^2

        The squared error has its minimum in closed form, and ranks suspects as well as Bradley-Terry heads do.

        Args:
            fold_of: ``(N,)`` fold of each pair.
            strength: of the penalty, above 0.
            labels: ``(N,)`` y, 1 where the label is as given, -1 where it is swapped.
            advance: told after each head that one more is done.
        Returns:
            Above 0 where the head agrees with the label.
        References:
            Rifkin, Yeo and Poggio (2003), Regularized least-squares classification.
        """
        gram, sums = self._gram, self.values.T @ labels
        penalty = strength * np.trace(gram) / len(gram)
        margins = np.empty(len(labels))
        for fold in range(int(fold_of.max()) + 1):
            judged = fold_of == fold
            here = self.values[judged]
            seen = gram - here.T @ here
            seen[np.diag_indices_from(seen)] += penalty or 1.0  # all differences 0: no head can tell pairs apart
            head = linalg.solve(seen, sums - here.T @ labels[judged], assume_a="pos")
            margins[judged] = labels[judged] * (here @ head)
            advance(1)
        return margins
