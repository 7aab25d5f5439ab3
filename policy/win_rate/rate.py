"""Win rates of preferences between two models' answers, plain and at equal lengths. Plain arrays in, numbers out."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.core.intervals import CONFIDENCE, Estimate

LARGEST_LOGIT = 30.0
EXACTLY = {"ftol": 1e-16, "gtol": 1e-9}


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often one model is preferred to another."""

    value: float
    """Mean preference; a tie is half a win."""
    standard_error: float | None
    """Standard error of the mean over questions; ``None`` for a single one."""
    length_controlled: Estimate | None
    """What it would be if both answered at equal length, with a 95 % interval over questions; ``None`` where lengths or
    preferences do not vary."""
    length_slope: float | None
    """Logits by which one standard deviation more of length, at small differences, raises the chance to win."""
    wins: int
    losses: int
    ties: int


def win_rate(preferences: ArrayLike, lengths: ArrayLike, reference_lengths: ArrayLike) -> WinRate:
    r"""Sum up preferences, also with the effect of length taken out.

    The length-controlled rate is AlpacaEval's ``length_controlled_minimal`` without its slight L1 penalty: a logistic
    regression of the preference on a constant and on tanh(d / sd(d)), d the difference of lengths, asked at d = 0.

    Args:
        preferences: ``(N,)`` in [0, 1]: 1 where the model won, 0 where the reference did, .5 for a tie.
        lengths: ``(N,)`` characters of the model's answers.
        reference_lengths: ``(N,)`` characters of the reference's.
    Raises:
        ValueError: if the shapes differ, there is nothing, or a preference is out of range.
    References:
        Dubois et al. (2024), arXiv:2404.04475; alpaca_eval 0.6.6, metrics/glm_winrate.py.
    """
    won, own, other = (np.asarray(values, np.float64) for values in (preferences, lengths, reference_lengths))
    if won.ndim != 1 or not won.shape == own.shape == other.shape or not len(won):
        raise ValueError(
            f"preferences {won.shape} and lengths {own.shape}, {other.shape} must be as many, one at least"
        )
    if not ((won >= 0) & (won <= 1)).all():
        raise ValueError("preferences must be in [0, 1]")
    error = float(won.std(ddof=1) / np.sqrt(len(won))) if len(won) > 1 else None
    controlled, slope = _controlled(won, own - other)
    return WinRate(
        value=float(won.mean()),
        standard_error=error,
        length_controlled=controlled,
        length_slope=slope,
        wins=int((won > 0.5).sum()),
        losses=int((won < 0.5).sum()),
        ties=int((won == 0.5).sum()),
    )


def logistic_fit(features: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(K,)`` weights that maximize the likelihood of targets in [0, 1] under a logistic model without intercept.

    Args:
        features: ``(N, K)``.
        targets: ``(N,)``.
    """
    from scipy.optimize import minimize  # here, as it takes long to import and few commands need it

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = features @ weights
        chances = 0.5 * (1 + np.tanh(logits / 2))
        return float(np.mean(np.logaddexp(0, logits) - targets * logits)), features.T @ (chances - targets) / len(
            targets
        )

    bounds = [(-LARGEST_LOGIT, LARGEST_LOGIT)] * features.shape[1]  # targets that can be told apart have no maximum
    found = minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds, options=EXACTLY)
    return np.asarray(found.x)


def _controlled(won: NDArray[np.float64], difference: NDArray[np.float64]) -> tuple[Estimate | None, float | None]:
    """The rate at equal lengths and the slope; the interval is that of the sandwich covariance of the fit."""
    if len(won) < 3 or difference.std() == 0 or won.std() == 0:
        return None, None
    features = np.column_stack([np.ones(len(won)), np.tanh(difference / difference.std(ddof=1))])
    weights = logistic_fit(features, won)
    chances = _logistic(features @ weights)
    bread = np.linalg.pinv((features * (chances * (1 - chances))[:, None]).T @ features)
    scores = features * (won - chances)[:, None]
    error = np.sqrt((bread @ (scores.T @ scores) @ bread)[0, 0])
    low, value, high = _logistic(weights[0] + error * NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * np.array([-1, 0, 1]))
    return Estimate(value=float(value), low=float(low), high=float(high)), float(weights[1])


def _logistic(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(logits / 2))
