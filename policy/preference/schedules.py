"""How the tolerance delta of Adaptive Margin-Sigmoid moves during a run."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.preference.config import DeltaConfig

BELOW_LOG_2 = 0.999 * math.log(2)
"""Upper bound of delta: at log 2 and above, no pair has a gradient at the start."""


class DeltaSchedule:
    """The delta of each step.

    Our reading: the report says that key parameters follow the training stage and the samples, and names a warm-up
    from 0 as its outlook (arXiv:2508.08466); "quantile" lets about the same share of pairs rest throughout.
    """

    def __init__(self, config: DeltaConfig, peak: float, beta: float, total_steps: int) -> None:
        self._config, self._peak, self._beta = config, peak, beta
        self._warmup_steps = max(1, round(config.warmup_share * total_steps))
        self._average: float | None = None
        self.value = peak

    def start_step(self, step: int) -> None:
        """Set :attr:`value` for 0-based ``step``."""
        if self._config.schedule == "warmup":
            self.value = self._peak * min(1.0, step / self._warmup_steps)
        elif self._config.schedule == "quantile":
            self.value = self._peak if self._average is None else min(self._average, BELOW_LOG_2)

    def end_step(self, logratio_gaps: Tensor) -> None:
        """Learn from the ``(N,)`` gaps d_w - d_l of all pairs of the step."""
        if self._config.schedule != "quantile" or not bool(torch.isfinite(logratio_gaps).all()):
            return
        losses = -F.logsigmoid(self._beta * logratio_gaps.float())
        quantile = float(losses.quantile(self._config.quantile))
        decay = self._config.decay
        self._average = quantile if self._average is None else decay * self._average + (1 - decay) * quantile

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = state["average"]
