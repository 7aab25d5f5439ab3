"""What objectives take of the whole batch (see policy.preference.batch_losses.STATISTICS), kept for its pairs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from policy.preference.batch_losses import RUNNING, STATISTICS
from policy.preference.config import TermConfig
from policy.preference.losses import LOSSES

EMA_DECAY = 0.9


class BatchStatistics:
    """The statistics of one objective, from the pairs of all ranks."""

    def __init__(self, term: TermConfig) -> None:
        objective = LOSSES[term.kind]
        self.names = objective.statistics
        self._parameters = term.values
        self._scalars: dict[str, Tensor] = {}
        self._by_pair: dict[str, Tensor] = {}
        self._running: dict[str, tuple[float, float]] = {}
        """Value, and number of pairs behind it."""

    def update(self, columns: Mapping[str, Tensor], positions: Tensor, pairs_in_step: int) -> None:
        """Take in ``(N,)`` columns of pairs that stand at ``positions`` of the global batch."""
        for name in self.names:
            value = STATISTICS[name](columns, self._parameters)
            if value.dim():
                if len(self._by_pair.get(name, ())) != pairs_in_step:
                    self._by_pair[name] = value.new_full((pairs_in_step,), torch.nan)
                self._by_pair[name][positions] = value
            else:
                self._scalars[name] = self._carried(name, value, len(positions))

    def arguments(self, positions: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the objective, for this rank's pairs."""
        return self._scalars | {name: values[positions] for name, values in self._by_pair.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._running = {name: tuple(entry) for name, entry in state["running"].items()}

    def _carried(self, name: str, value: Tensor, pairs: int) -> Tensor:
        """The value joined with those of earlier batches, where the method says so."""
        if name not in RUNNING or not bool(torch.isfinite(value)):
            return value
        before, count = self._running.get(name, (float(value), 0.0))
        share = pairs / (count + pairs) if RUNNING[name] == "mean" else 1 - EMA_DECAY
        joined = before + share * (float(value) - before)
        self._running[name] = joined, count + pairs
        return torch.full_like(value, joined)
