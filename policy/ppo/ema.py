"""A moving average of the trained weights of an engine."""

import torch
from torch import Tensor

from rlhf.engine.api import Engine


class MovingAverage:
    """Kept in float32 on the CPU of the main rank. Every rank must call each method."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """``decay`` per update: 0.9 remembers about ten."""
        self._engine, self._decay = engine, decay
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._weights = self._read()

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are now."""
        for mine, now in zip(self._weights, self._read(), strict=True):
            mine.lerp_(now, 1 - self._decay)

    @torch.no_grad()
    def put_into_engine(self) -> None:
        """Overwrite the engine's weights by the average: it can be asked and published, no longer trained."""
        ranks = self._engine.ranks
        for place, parameter in enumerate(self._parameters):
            value = ranks.broadcast_object(self._weights[place] if ranks.is_main else None)
            with self._engine.whole([parameter], modify=True):
                parameter.copy_(value)

    def state_dict(self) -> list[Tensor]:
        return self._weights

    def load_state_dict(self, state: list[Tensor]) -> None:
        if self._engine.ranks.is_main:
            self._weights = [value.clone() for value in state]

    def _read(self) -> list[Tensor]:
        found = []
        for parameter in self._parameters:
            with self._engine.whole([parameter]):
                if self._engine.ranks.is_main:
                    found.append(parameter.detach().float().cpu().clone())
        return found
