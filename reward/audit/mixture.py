"""Right and wrong labels as a mixture of margins: how many are wrong, and which.

Plain arrays in, numbers out: no ranks, no files, no model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.core.intervals import CONFIDENCE

Array = NDArray[np.float64]

LARGEST_SHARE = 0.5
"""Highest share that is looked for: if more were wrong, all labels swapped would be the better ones."""
_SHARES = np.concatenate([np.linspace(0, 0.1, 21), np.linspace(0.11, LARGEST_SHARE, 40)])
_TEMPERATURES = np.geomspace(0.05, 20, 41)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What was fitted to margins."""

    share: float
    """Share of wrong labels, in [0, 0.5]."""
    temperature: float
    """Margins are divided by it to be log-odds of right labels."""
    log_likelihood: float
    """Mean over pairs, in nats; log(1/2) = -0.693 is what margins without any knowledge reach."""


def log_likelihoods(margins: Array, share: float, temperature: float) -> Array:
    r"""``(N,)`` log-probabilities of the labels as they are given.

        log p_i = log((1 - share) sigmoid(m_i / temperature) + share sigmoid(-m_i / temperature))

    The answer called chosen is the better one with probability ``sigmoid(m_i / temperature)``, and a share of the
    labels is then swapped, whatever the pair.

    Args:
        margins: ``(N,)`` reward gaps, chosen minus rejected, by models that did not see these pairs.
        share: of wrong labels, in [0, 0.5].
        temperature: above 0.
    References:
        Natarajan et al. (NeurIPS 2013), Learning with noisy labels: class-conditional noise, here of one rate, as the
        two answers have no order of their own.
    """
    return _log(share + (1 - 2 * share) * _sigmoid(margins / temperature))


def posterior_wrong(margins: Array, share: float, temperature: float) -> Array:
    r"""``(N,)`` probabilities that a label is wrong, given that it was given.

        P_i = share sigmoid(-m_i / T) / ((1 - share) sigmoid(m_i / T) + share sigmoid(-m_i / T))

    Args:
        margins, share, temperature: see :func:`log_likelihoods`.
    Returns:
        0 for all pairs if ``share`` is 0: a small margin alone is a hard pair, not a wrong one.
    """
    if share == 0:
        return np.zeros_like(margins)
    log_odds = np.log(share / (1 - share)) - margins / temperature
    return _sigmoid(log_odds)


def fit_mixture(margins: Array, weights: Array | None = None) -> Mixture:
    """Share and temperature of the greatest likelihood.

    Found on a grid, as the likelihood is nearly flat along a valley from few wrong labels at a high temperature to
    many at a low one; a second, finer grid around the best cell follows.

    Args:
        margins: ``(N,)`` finite, see :func:`log_likelihoods`.
        weights: ``(N,)`` how often each pair counts; ``None`` for once.
    Raises:
        ValueError: if there are no margins, or one is not finite.
    """
    if not len(margins) or not np.isfinite(margins).all():
        raise ValueError(f"need finite margins; got {int((~np.isfinite(margins)).sum())} others among {len(margins)}")
    scale = float(np.abs(margins).mean()) or 1.0
    counts = np.ones_like(margins) if weights is None else weights
    share, temperature = _best(margins, counts, _SHARES, scale * _TEMPERATURES)
    fine = np.clip(share + np.linspace(-0.01, 0.01, 21), 0, LARGEST_SHARE)
    share, temperature = _best(margins, counts, fine, temperature * np.geomspace(0.86, 1.16, 21))
    likelihood = float(np.average(log_likelihoods(margins, share, temperature), weights=counts))
    return Mixture(share=share, temperature=temperature, log_likelihood=likelihood)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A share with its 95 % interval."""

    share: float
    low: float
    high: float


def share_interval(
    margins: Array,
    groups: NDArray[np.uint64],
    *,
    temperature: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """The share of the greatest likelihood, with a percentile interval from resampling whole groups.

    Args:
        margins: ``(N,)``, see :func:`log_likelihoods`.
        groups: ``(N,)`` equal for pairs of the same prompt, which are not independent of each other.
        temperature: fitted along with the share if ``None``.
        resamples: draws with replacement.
        seed: of these draws.
    References:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap, ch. 13; by clusters, as pairs share prompts.
    """
    scale = float(np.abs(margins).mean()) or 1.0
    temperatures = scale * _TEMPERATURES if temperature is None else np.array([temperature])
    _, members = np.unique(groups, return_inverse=True)
    prompts = int(members.max()) + 1
    draws = np.random.default_rng((seed, 1)).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    counts = np.concatenate([np.ones((1, len(margins))), draws[:, members]]).T
    best, chosen = np.full(resamples + 1, -np.inf), np.zeros(resamples + 1)
    for each in temperatures:
        right = _sigmoid(margins / each)
        totals = _log(_SHARES[:, None] + (1 - 2 * _SHARES[:, None]) * right) @ counts
        highest, place = totals.max(0), totals.argmax(0)
        better = highest > best
        best[better], chosen[better] = highest[better], _SHARES[place][better]
    low, high = np.quantile(chosen[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(share=float(chosen[0]), low=float(low), high=float(high))


def _best(margins: Array, counts: Array, shares: Array, temperatures: Array) -> tuple[float, float]:
    best = (-np.inf, 0.0, 1.0)
    for temperature in temperatures:
        right = _sigmoid(margins / temperature)
        totals = _log(shares[:, None] + (1 - 2 * shares[:, None]) * right) @ counts
        place = int(totals.argmax())
        best = max(best, (float(totals[place]), float(shares[place]), float(temperature)))
    return best[1:]


def _sigmoid(values: Array) -> Array:
    return 0.5 * (1 + np.tanh(values / 2))


def _log(probabilities: Array) -> Array:
    return np.log(np.maximum(probabilities, np.finfo(float).tiny))
