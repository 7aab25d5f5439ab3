"""The recipe of supervised fine-tuning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from policy.options import PolicyConfig
from policy.roles import policy_role
from rlhf.core.annotations import NoResult
from rlhf.data.options import ExampleDataConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.roles import ModelRole
from rlhf.train.options import TrainConfig
from rlhf.train.workload import Workload


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A run of supervised fine-tuning."""

    output: Annotated[Path, NoResult()]
    """Run folder: config, logs, checkpoints, and final/ when done."""
    model: PolicyConfig
    data: ExampleDataConfig
    """Conversations; the assistant turns in them are learned."""
    optim: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(best_metric="-eval/loss"))
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """The models of the run."""
        return (policy_role(self.model, "model", self.optim, self.engine),)

    @property
    def workload(self) -> Workload:
        """What a step computes."""
        return Workload(rows=self.data, kind="conversation")
