"""A moving average of the trained weights of an engine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf.engine.api import Engine
from rlhf.engine.portions import Portions


class MovingAverage:
    """Kept in float32 on the CPUs: each rank has its part. Every rank must call each method."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """``decay`` per update: 0.9 remembers about ten."""
        self._engine, self._decay = engine, decay
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._weights = Portions(engine, self._parameters, torch.float32)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are now."""
        for mine, now in zip(self._weights.parts, self._weights.of_now(), strict=True):
            mine.lerp_(now, 1 - self._decay)

    def put_into_engine(self) -> None:
        """Overwrite the engine's weights by the average: it can be asked and published, no longer trained."""
        self._weights.put()

    @contextlib.contextmanager
    def in_engine(self) -> Iterator[None]:
        """The engine has the average inside the block, and then the very weights that it had before."""
        with Portions(self._engine, self._parameters).put_back():
            self.put_into_engine()
            yield

    def save(self, folder: Path) -> None:
        self._weights.save(folder)

    def load(self, folder: Path) -> None:
        self._weights.load(folder)
