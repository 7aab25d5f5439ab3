"""The recipe of the reward stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from reward.losses import LOSSES
from reward.model import RewardModelConfig
from rlhf.core.annotations import NoResult
from rlhf.data.options import DataConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.roles import ModelRole
from rlhf.train.options import TrainConfig
from rlhf.train.workload import Workload


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """How the margin of a pair is made. It is a handicap on the chosen reward, constant to the gradient."""

    kind: Literal["none", "constant", "column", "similarity", "reward", "ot"] = "ot"
    """none. constant: the same for all. column: the data's margin column, else the gap of its scores. similarity:
    cosine of the two answers. reward: the pair's own reward cost. ot: optimal transport over all pairs at hand."""
    scale: Annotated[float, Gt(0)] = 1.0
    """Every margin is multiplied by this."""
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the run over which the scale rises from 0."""
    constant: float = 0.5
    """The margin of kind constant, in logits."""
    reward_weight: Annotated[float, Ge(0)] = 0.9
    """Weight of the reward term in the cost."""
    semantic_weight: Annotated[float, Ge(0)] = 0.1
    """Weight of the cosine of the embeddings in the cost."""
    epsilon: Annotated[float, Gt(0)] = 0.1
    """Entropic regularization of the transport plan, in units of the cost."""
    max_iterations: Annotated[int, Gt(0)] = 50
    """Sinkhorn sweeps at most."""
    reward_cost: Literal["abs", "signed"] = "abs"
    """abs: hard is what has a small reward gap. signed: hard is what is ranked wrongly, too."""
    center_rewards: bool = True
    """Take the mean reward of each pair out before comparing across pairs."""
    reading: Literal["row", "row_sum", "pair", "max"] = "row"
    """How a row of the plan becomes a margin: its mean cost, its raw sum, the pair's own cost without a plan, or the
    hardest opponent's."""
    scope: Literal["micro_step", "global_batch"] = "micro_step"
    """micro_step: the pairs that all ranks hold at once, plus the queue. global_batch: exactly all pairs of the step,
    for one more forward pass; results then do not depend on ranks or micro-batches."""
    queue_pairs: Annotated[int, Ge(0)] = 0
    """Recent pairs whose rejected rows join as further columns of the plan (kind ot, scope micro_step)."""

    def __post_init__(self) -> None:
        if self.queue_pairs and (self.kind != "ot" or self.scope != "micro_step"):
            raise ValueError(
                f"queue_pairs = {self.queue_pairs} needs kind = ot and scope = micro_step, "
                f"not kind = {self.kind} and scope = {self.scope}"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective on a pair's reward gap."""

    kind: str = "bradley_terry"
    """A name of reward.losses.LOSSES."""
    parameters: dict[str, float] = field(default_factory=dict)
    """Hyper-parameters of that loss, by name; what is not given has the loss's default."""

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ValueError(f"kind = {self.kind}: no such loss; there are {', '.join(sorted(LOSSES))}")
        known = LOSSES[self.kind].parameters
        unknown = sorted(set(self.parameters) - set(known))
        if unknown:
            raise ValueError(f"parameters {unknown}: {self.kind} has {sorted(known) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A run of the reward stage."""

    output: Annotated[Path, NoResult()]
    """Run folder: config, logs, checkpoints, and final/ when done."""
    model: RewardModelConfig
    data: DataConfig
    margin: MarginConfig = field(default_factory=MarginConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.margin.kind != "none" and not LOSSES[self.loss.kind].takes_margins:
            raise ValueError(
                f"loss.kind = {self.loss.kind} has no place for a margin, but margin.kind = {self.margin.kind}; "
                "set margin.kind=none or take another loss"
            )

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """The models of the run."""
        return (
            ModelRole(
                name="reward model",
                section="model",
                setting="model.path",
                backbone=self.model,
                kind="reward model",
                optimizer=self.optim,
                placement=self.engine.deepspeed,
                placed_by="engine.deepspeed",
                published=True,
                with_lm_head="chosen_logprobs" in LOSSES[self.loss.kind].inputs,
            ),
        )

    @property
    def workload(self) -> Workload:
        """What a step computes."""
        return Workload(rows=self.data, kind="pairs", first_pass=self.over_all_pairs)

    @property
    def over_all_pairs(self) -> bool:
        """Whether margins or statistics are taken over the whole global batch, in a first pass."""
        needed = self.margin.kind == "ot" or bool(LOSSES[self.loss.kind].statistics)
        return self.margin.scope == "global_batch" and needed
