"""Margins of pairs by heads that did not see them: fitted to frozen features and answers, fold by fold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from reward.audit.mixture import Array

STRENGTHS = (0.3, 1.0, 3.0, 10.0)
"""Strengths of the ridge penalty that are tried, in units of the mean squared feature of all pairs together."""
EFFECTS = (0.0, 0.1, 0.3, 1.0)
"""Variances of the answers' own worth that are tried, in units of the noise of a label, where pairs share answers."""


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


@dataclass(frozen=True, eq=False)
class Differences:
    """What heads read of N pairs: features of chosen minus those of rejected, each of unit spread, and the answers."""

    values: Array
    """``(N, D)``."""
    answers: NDArray[np.int64] | None = None
    """``(N, 2)`` numbers of the chosen and the rejected answer, equal for equal answers to the same prompt; ``None``
    where no pairs share one."""

    @classmethod
    def of(cls, chosen: Array, rejected: Array, answers: NDArray[np.int64] | None = None) -> "Differences":
        """The differences of ``(N, D)`` features of the answers."""
        spread = np.concatenate([chosen, rejected]).std(0, dtype=np.float64)
        return cls((chosen - rejected) / np.maximum(spread, 1e-6), answers)

    @property
    def shares_answers(self) -> bool:
        """Whether an answer stands in more than one pair."""
        return bool(self._components)

    def out_of_fold_margins(
        self,
        fold_of: NDArray[np.int64],
        strengths: Sequence[float],
        effect: float,
        labels: Array,
        *,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Array:
        r"""``(S, N)`` reward gaps of pairs, each by the head that was fitted to all other folds, by strength.

            m_i = y_i (x_i . w + u_chosen(i) - u_rejected(i))
            w, u = argmin sum over the pairs j outside of the fold of (y_j - x_j . w - u_chosen(j) + u_rejected(j))^2
                          + strength trace(X^T X) / D |w|^2 + |u|^2 / effect

        A reward is linear in the features, plus what an answer is worth beyond them: u, which other pairs with the
        same answer tell. The squared error has its minimum in closed form, and ranks suspects as well as
        Bradley-Terry heads do.

        Args:
            fold_of: ``(N,)`` fold of each pair.
            strengths: S of the penalty of w, above 0; what a fold sees is added up once for all.
            effect: variance of the answers' own worth in units of that of a label; 0 for features alone.
            labels: ``(N,)`` y, 1 where the label is as given, -1 where it is swapped.
            advance: told after each fold how many more heads are done.
        Returns:
            Above 0 where the head agrees with the label.
        References:
            Rifkin, Yeo and Poggio (2003), Regularized least-squares classification; u are random effects, whose best
            linear predictor this is (Henderson, 1975).
        """
        values = self.values
        size = float(np.square(values).sum())
        margins = np.empty((len(strengths), len(labels)))
        gram, sums = self._moments(effect, labels)
        for fold in range(int(fold_of.max()) + 1):
            judged = fold_of == fold
            seen, targets = gram.copy(), sums.copy()
            parts = []
            for component, whole in self._parts(effect):
                here = judged[component]
                if not here.any():
                    continue
                inner = values[component]
                seen -= inner.T @ whole @ inner
                targets -= inner.T @ (whole @ labels[component])
                rest, out = component[~here], component[here]
                if len(rest):
                    kernel = effect * self._kernel(rest, rest) + np.eye(len(rest))
                    shrunk = np.linalg.inv(kernel)
                    seen += values[rest].T @ shrunk @ values[rest]
                    targets += values[rest].T @ (shrunk @ labels[rest])
                    parts.append((rest, out, effect * self._kernel(out, rest) @ shrunk))
            alone = judged & self._alone(effect)
            weight = 1 / (1 + 2 * effect)
            seen -= weight * values[alone].T @ values[alone]
            targets -= weight * values[alone].T @ labels[alone]
            for found, strength in zip(margins, strengths, strict=True):
                penalty = strength * size / values.shape[1]
                penalized = seen.copy()
                penalized[np.diag_indices_from(seen)] += penalty or 1.0  # differences all 0: no head tells pairs apart
                head = linalg.solve(penalized, targets, assume_a="pos")
                found[judged] = values[judged] @ head
                for rest, out, reading in parts:
                    found[out] += reading @ (labels[rest] - values[rest] @ head)
            advance(len(strengths))
        return labels * margins

    @cached_property
    def _components(self) -> list[NDArray[np.int64]]:
        """Places of the pairs of each group that answers hold together, where there are several."""
        if self.answers is None:
            return []
        pairs, answers = len(self.answers), int(self.answers.max()) + 1
        places = np.repeat(np.arange(pairs), 2)
        stands_in = sparse.csr_array((np.ones(2 * pairs), (places, self.answers.ravel())), shape=(pairs, answers))
        _, group_of = sparse.csgraph.connected_components(stands_in @ stands_in.T, directed=False)
        order = np.argsort(group_of, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
        return [group for group in groups if len(group) > 1]

    @cached_property
    def _single(self) -> NDArray[np.bool_]:
        """``(N,)`` whether a pair shares no answer with another."""
        single = np.ones(len(self.values), bool)
        for component in self._components:
            single[component] = False
        return single

    def _alone(self, effect: float) -> NDArray[np.bool_]:
        """``(N,)`` pairs that no other one says anything of, beyond the features."""
        return self._single if effect else np.ones(len(self.values), bool)

    def _kernel(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """Covariance of the worth of pairs beyond their features, for answers of unit variance."""
        assert self.answers is not None
        first, second = self.answers[rows], self.answers[columns]
        same = (first[:, None, :, None] == second[None, :, None, :]).astype(np.float64)
        return same[..., 0, 0] + same[..., 1, 1] - same[..., 0, 1] - same[..., 1, 0]

    @lru_cache(maxsize=8)  # noqa: B019 (an object lives as long as its audit)
    def _parts(self, effect: float) -> list[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Each component with the inverse of its covariance."""
        if not effect:
            return []
        return [
            (component, np.linalg.inv(effect * self._kernel(component, component) + np.eye(len(component))))
            for component in self._components
        ]

    def _moments(self, effect: float, labels: Array) -> tuple[Array, Array]:
        """Products of all pairs, weighted by what is certain of them, with each other and with the labels."""
        alone, weight = self._alone(effect), 1 / (1 + 2 * effect)
        values = self.values[alone]
        gram, sums = weight * values.T @ values, weight * values.T @ labels[alone]
        for component, whole in self._parts(effect):
            inner = self.values[component]
            gram += inner.T @ whole @ inner
            sums += inner.T @ (whole @ labels[component])
        return gram, sums
