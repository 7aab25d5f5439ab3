"""How the tolerance delta of Adaptive Margin-Sigmoid moves during a run."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.preference.config import DeltaConfig


class DeltaSchedule:
    """The delta of each step.

    Our reading: the report says that key parameters follow the training stage and the samples, and names a warm-up
    from 0 as its outlook (arXiv:2508.08466). "quantile" takes delta down as pairs fall below it, so that about that
    share of them rests at most; at the start, where all losses are log 2, it leaves delta as it is.
    """

    def __init__(self, config: DeltaConfig, peak: float, beta: float, total_steps: int) -> None:
        self._config, self._peak, self._beta = config, peak, beta
        self._warmup_steps = max(1, round(config.warmup_share * total_steps))
        self._average = peak
        self.value = peak

    def start_step(self, step: int) -> None:
        """Set :attr:`value` for 0-based ``step``."""
        if self._config.schedule == "warmup":
            self.value = self._peak * min(1.0, step / self._warmup_steps)
        elif self._config.schedule == "quantile":
            self.value = self._average

    def end_step(self, logratio_gaps: Tensor) -> None:
        """Learn from the ``(N,)`` gaps d_w - d_l of all pairs of the step."""
        if self._config.schedule != "quantile" or not bool(torch.isfinite(logratio_gaps).all()):
            return
        losses = -F.logsigmoid(self._beta * logratio_gaps.float())
        quantile = min(self._peak, float(losses.quantile(self._config.quantile)))
        self._average += (1 - self._config.decay) * (quantile - self._average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = state["average"]
