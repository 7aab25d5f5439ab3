"""Means over all pairs at hand that some losses take (see reward.losses.STATISTICS)."""

from typing import Any

import torch
from torch import Tensor

from reward.losses import STATISTICS, moving_average
from reward.pairs import Pairs
from reward.tables import Loss

RUNNING = "mean_distance"


class StepStatistics:
    """Computes what one loss asks for, from the pairs of all ranks. NormBT's mean distance is a running mean."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._means: dict[str, Tensor] = {}
        self._distances = torch.empty(0)
        self._pairs = 0
        self._running: float | None = None

    def update(self, pairs: Pairs, pairs_in_step: int) -> None:
        self._pairs = len(pairs)  # of the same set as the means
        distances = (pairs.chosen_embeddings - pairs.rejected_embeddings).norm(dim=1)
        if len(self._distances) != pairs_in_step:
            self._distances = distances.new_zeros(pairs_in_step)
        self._distances[pairs.positions] = distances
        for name in set(self._loss.statistics) & set(STATISTICS):
            mean = STATISTICS[name](pairs.chosen_rewards, pairs.rejected_rewards, distances).mean()
            if name == RUNNING:
                if torch.isfinite(mean):
                    self._running = float(moving_average(self._running, float(mean)))
                mean = torch.tensor(float("nan") if self._running is None else self._running)
            self._means[name] = mean

    def arguments(self, positions: Tensor) -> dict[str, Any]:
        """Keyword arguments of the loss for this rank's pairs."""
        arguments: dict[str, Any] = dict(self._means)
        if "pairs" in self._loss.statistics:
            arguments["pairs"] = float(self._pairs)
        if "distances" in self._loss.inputs:
            arguments["distances"] = self._distances[positions]
        return arguments

    def state_dict(self) -> dict[str, Any]:
        return {"running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._running = state["running"]
