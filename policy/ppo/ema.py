"""A moving average of the trained weights of an engine."""

import contextlib
from collections.abc import Iterator

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

    def put_into_engine(self) -> None:
        """Overwrite the engine's weights by the average: it can be asked and published, no longer trained."""
        self._put(self._weights)

    @torch.no_grad()
    def _put(self, weights: list[Tensor]) -> None:
        ranks = self._engine.ranks
        for place, parameter in enumerate(self._parameters):
            value = ranks.broadcast_object(weights[place] if ranks.is_main else None)
            with self._engine.whole([parameter], modify=True):
                parameter.copy_(value)

    @contextlib.contextmanager
    def in_engine(self) -> Iterator[None]:
        """The engine has the average inside the block, and then the very weights that it had before."""
        before = self._read(dtype=None)
        self.put_into_engine()
        try:
            yield
        finally:
            self._put(before)

    def state_dict(self) -> list[Tensor]:
        return self._weights

    def load_state_dict(self, state: list[Tensor]) -> None:
        if self._engine.ranks.is_main:
            self._weights = [value.clone() for value in state]

    def _read(self, dtype: torch.dtype | None = torch.float32) -> list[Tensor]:
        """Copies on the CPU of the main rank; ``None`` keeps the type of the weights."""
        found = []
        for parameter in self._parameters:
            with self._engine.whole([parameter]):
                if self._engine.ranks.is_main:
                    found.append(parameter.detach().to("cpu", dtype, copy=True))
        return found
