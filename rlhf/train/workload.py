"""What a run computes, as its recipe says: what a plan needs to know beside the models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from rlhf.data.options import LabelsConfig, RowsConfig
from rlhf.engine.options import EngineConfig
from rlhf.models.roles import ModelRole
from rlhf.train.options import TrainConfig

RowsKind = Literal["pairs", "conversation", "unpaired", "prompts"]
"""How rows of data become tokens; unpaired rows are single answers with a label."""


@dataclass(frozen=True, kw_only=True)
class RolloutLoad:
    """The responses that a step writes before it learns from them. They come from the recipe's section ``rollout``."""

    prompts: int
    """Prompts of a step, over all ranks."""
    samples: int
    """Responses to each."""
    max_new_tokens: int
    batch_rows: int
    """Responses that one rank writes together."""
    gather: Literal["auto", "once", "never"]
    """Whether a whole copy of the policy is made where its weights are sharded."""
    epochs: int
    """Passes over them."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows of a run and what every step does with them."""

    rows: RowsConfig
    """The section that they come from."""
    kind: RowsKind
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    """Whether the labels of pairs are believed."""
    rollout: RolloutLoad | None = None
    """What is generated, in stages whose rows are prompts to be answered."""
    first_pass: bool = False
    """Whether a step goes over all its rows once without gradient before it trains on them."""
    cached_numbers: int = 0
    """float32 numbers of each row that a pass before the first step keeps on disk."""

    @property
    def rows_per_item(self) -> int:
        """Rows that a model reads of each item: both answers of a pair; of a single answer, also another one to it."""
        return 2 if self.kind in ("pairs", "unpaired") else 1


class TrainingRecipe(Protocol):
    """What plans and checks read of a recipe, whatever its stage."""

    @property
    def output(self) -> Path: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def engine(self) -> EngineConfig: ...

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """The models of the run, in the order in which the stage loads them."""

    @property
    def workload(self) -> Workload: ...
