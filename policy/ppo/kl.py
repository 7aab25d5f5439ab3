"""The coefficient of the KL penalty from step to step."""

import math

from rlhf.core.checks import check_positive, check_range


class FixedKl:
    """A coefficient that stays the same.

    Args:
        coefficient: reward per nat, at least 0.
    """

    def __init__(self, coefficient: float) -> None:
        check_range(0, math.inf, coefficient=coefficient)
        self.coefficient = coefficient

    def update(self, kl: float, sequences: int) -> None:
        """Change nothing; see :meth:`AdaptiveKl.update`."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Check that ``state`` is that of a fixed coefficient.

        Raises:
            ValueError: if the state is an adaptive controller's.
        """
        if state:
            raise ValueError("this is the state of an adaptive KL coefficient, and the coefficient is fixed")


CORRECTIONS = 50
"""Horizons in a run, where the recipe gives none: the coefficient can change by a factor of e in a tenth of the run. At
500 steps this is the 0.1 of Ziegler et al.; the 10,000 responses of their code leave it where it is in short runs."""


def horizon_of(steps: int, rollouts: int) -> float:
    """Horizon for a run of so many steps of so many responses, in responses: no step changes more than a fifth."""
    return rollouts * max(1.0, steps / CORRECTIONS)


class AdaptiveKl:
    r"""A coefficient that steers the KL of a response towards a target.

        error = clip(kl / target - 1, -0.2, 0.2),   coefficient <- coefficient (1 + error sequences / horizon)

    Args:
        coefficient: to begin with; reward per nat.
        target: nats per response.
        horizon: responses; over so many, an error of 0.2 changes the coefficient by about a factor of exp(0.2).
    Raises:
        ValueError: if a number is not positive.
    References:
        Ziegler et al., arXiv:1909.08593, sec. 2.2, where sequences / horizon is a constant, 0.1; the quotient is
        that of their code.
    """

    def __init__(self, coefficient: float, target: float, horizon: float) -> None:
        check_positive(coefficient=coefficient, target=target, horizon=horizon)
        self.coefficient, self._target, self._horizon = coefficient, target, horizon

    def update(self, kl: float, sequences: int) -> None:
        """Learn from a step.

        Args:
            kl: mean over its responses of the k1 estimates summed over tokens, in nats.
            sequences: its responses.
        Raises:
            ValueError: if ``kl`` is not finite, or the responses are so many that the coefficient would end at 0.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite, not {kl}")
        if not sequences < 5 * self._horizon:
            raise ValueError(f"horizon = {self._horizon} must be more than a fifth of a step's {sequences} responses")
        error = min(max(kl / self._target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * sequences / self._horizon

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with the coefficient in ``state``.

        Raises:
            ValueError: if the state is a fixed coefficient's.
        """
        if "coefficient" not in state:
            raise ValueError("this is the state of a fixed KL coefficient, and the coefficient is adaptive")
        self.coefficient = state["coefficient"]
