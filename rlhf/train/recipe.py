"""What the recipes of all stages have in common."""

from pathlib import Path
from typing import Protocol

from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.options import BackboneConfig
from rlhf.train.options import TrainConfig


class StageConfig(Protocol):
    """Sections that the recipe of every stage has."""

    @property
    def output(self) -> Path: ...

    @property
    def model(self) -> BackboneConfig: ...

    @property
    def optim(self) -> OptimizerConfig: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def engine(self) -> EngineConfig: ...
