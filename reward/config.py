"""The recipe of the reward stage."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from reward.tables import LOSSES, MARGINS, WEIGHTS, Margin
from rlhf.core.annotations import Formerly, NoResult
from rlhf.core.table import listed, parameter_values
from rlhf.data.options import DataConfig, LabelsConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import ModelRole
from rlhf.train.options import TrainConfig
from rlhf.train.workload import Workload


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(BackboneConfig):
    """Backbone and head of the reward model."""

    head: Literal["linear", "mlp", "bnrm"] = "linear"
    """linear loads with plain Transformers. mlp (two layers, as in GRM) has no place in
    AutoModelForSequenceClassification: such a model is loaded by reward.saving and `rlhf score` only. bnrm (Bayesian,
    non-negative) knows a variance of each reward, too: published like mlp, or with head_hidden = 0 like linear."""
    head_hidden: Annotated[int, Ge(0)] = 1024
    """Width of the mlp head; local factors of the bnrm head, 0 for none: its mean is linear then."""
    heads: Annotated[int, Gt(0)] = 1
    """Linear heads on the one backbone, each with a start and a draw of the pairs of its own. A reward is their mean;
    PPO can take how far they are apart off it (reward.combine = mean_minus_sd)."""
    kl_weight: Annotated[float, Ge(0)] = 1e-5
    """Weight of the divergences of a bnrm head's factors and dictionary from their priors; 1 is the evidence bound."""
    head_init_scale: Annotated[float, Gt(0)] = 1.0
    """The last layer starts at a standard deviation of this over (D + 1): all rewards start near 0."""
    new_head: bool = False
    """Start from a new head also where the folder is a reward model, with one of its own (one label, head=linear)."""

    def __post_init__(self) -> None:
        if self.head == "mlp" and not self.head_hidden:
            raise ValueError("head_hidden = 0 is for head = bnrm; an mlp head needs a width")
        if self.heads > 1 and self.head != "linear":
            raise ValueError(f"heads = {self.heads} needs head = linear, not {self.head}")


class _OverPairs:
    """What sections have in common that make a number for each pair, from all pairs at hand."""

    values: dict[str, Any]

    @property
    def over_all_pairs(self) -> bool:
        """Whether the numbers are made of exactly all pairs of the global batch, in a first pass."""
        return self.values.get("scope") == "global_batch"

    @property
    def queue_pairs(self) -> int:
        """Recent pairs that the numbers are made of, beside those at hand."""
        return self.values.get("queue_pairs", 0)

    def _check_queue(self) -> None:
        if self.queue_pairs and self.over_all_pairs:
            raise ValueError(
                f"parameters.queue_pairs = {self.queue_pairs} needs parameters.scope = micro_step, not global_batch"
            )


@dataclass(frozen=True, kw_only=True)
class MarginConfig(_OverPairs):
    """How the margin of a pair is made. It is a handicap on the chosen reward, constant to the gradient."""

    kind: str = "ot"
    """none. constant: the same for all. column: the data's margin column, else the gap of its scores. similarity:
    cosine of the two answers. reward: the pair's own reward cost. ot: optimal transport over all pairs at hand."""
    parameters: Annotated[
        dict[str, Any],
        listed(MARGINS),
        Formerly("max_sweeps", entry="max_iterations"),
        Formerly("centre_rewards", entry="center_rewards"),
    ] = field(default_factory=dict)
    """What that kind takes, by name (docs/reward.md); what is not given has its default."""
    scale: Annotated[float, Gt(0)] = 1.0
    """Every margin is multiplied by this."""
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the run over which the scale rises from 0."""

    def __post_init__(self) -> None:
        reading = self.values.get("reading")
        unused = [name for name in ("epsilon", "max_iterations") if name in self.parameters]
        if reading in ("pair", "max") and unused:
            raise ValueError(
                f"parameters.{unused[0]} = {self.parameters[unused[0]]} is of the transport plan, and "
                f"parameters.reading = {reading} reads none: leave it out, or read row or row_sum"
            )
        self._check_queue()

    @cached_property
    def values(self) -> dict[str, Any]:  # type: ignore[override]
        """All parameters of the kind."""
        return parameter_values(MARGINS, self.kind, self.parameters, noun="margin")

    @property
    def row(self) -> Margin:
        return MARGINS[self.kind]

    @property
    def neutral(self) -> float:
        """The margin that changes nothing."""
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        """The settings, defaults of the kind included."""
        return asdict(self) | {"parameters": self.values}


@dataclass(frozen=True, kw_only=True)
class WeightConfig(_OverPairs):
    """How much the loss of a pair counts: a factor, constant to the gradient."""

    kind: str = "none"
    """none: all alike. transport: a partial optimal-transport plan over all pairs at hand leaves those that fit worst
    behind, as wrong labels do."""
    parameters: Annotated[dict[str, Any], listed(WEIGHTS)] = field(default_factory=dict)
    """What that kind takes, by name (docs/reward.md); what is not given has its default."""
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the run over which weights come to differ from 1: a model that knows nothing finds nothing wrong."""

    def __post_init__(self) -> None:
        self._check_queue()

    @cached_property
    def values(self) -> dict[str, Any]:  # type: ignore[override]
        """All parameters of the kind."""
        return parameter_values(WEIGHTS, self.kind, self.parameters, noun="weights")

    @property
    def row(self) -> Margin:
        return WEIGHTS[self.kind]

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def neutral(self) -> float:
        """The weight that changes nothing."""
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """The settings, defaults of the kind included."""
        return asdict(self) | {"parameters": self.values}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective on a pair's reward gap."""

    kind: str = "bradley_terry"
    """A name of reward.tables.LOSSES."""
    parameters: Annotated[dict[str, Any], listed(LOSSES)] = field(default_factory=dict)
    """Hyper-parameters of that loss, by name; what is not given has the loss's default."""
    scope: Literal["micro_step", "global_batch"] = "micro_step"
    """Pairs that pos_reg, norm_bt and bsr take their means over. micro_step: those that all ranks hold at once.
    global_batch: exactly all pairs of the step, for one more forward pass."""

    def __post_init__(self) -> None:
        _ = self.values  # refuses what the loss does not take

    @cached_property
    def values(self) -> dict[str, Any]:
        """All hyper-parameters of the loss."""
        return parameter_values(LOSSES, self.kind, self.parameters, noun="loss")

    def to_dict(self) -> dict[str, Any]:
        """The settings, defaults of the kind included."""
        return asdict(self) | {"parameters": self.values}


def labels_fault(labels: LabelsConfig, data: DataConfig, one_sided: str | None) -> str:
    """Why labels cannot be treated so; empty if they can.

    Args:
        labels: what the recipe asks for.
        data: what it is to be done to.
        one_sided: the loss, if it has no opposite.
    """
    if labels.kind == "as_given":
        return ""
    if data.flip_labels:
        return (
            f"labels.kind = {labels.kind}, but data.flip_labels = {data.flip_labels} swaps labels after their audit: "
            "swap them in the file, and audit that"
        )
    if labels.use == "soft" and one_sided:
        return (
            f"labels.use = soft, but loss.kind = {one_sided} has no opposite that the other label could stand for: "
            "set labels.use to swap, drop or weight"
        )
    return ""


def check_queues(over_all_pairs: bool, **sections: MarginConfig | WeightConfig) -> None:
    """Refuse a queue where all pairs of a step are looked at together.

    Raises:
        ValueError: naming the section that asks for one.
    """
    for name, section in sections.items():
        if over_all_pairs and section.queue_pairs:
            raise ValueError(
                f"{name}.parameters.queue_pairs = {section.queue_pairs} needs the scope of margins, weights and loss "
                "to be micro_step, not global_batch"
            )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A run of the reward stage."""

    output: Annotated[Path, NoResult()]
    """Run folder: config, logs, checkpoints, and final/ when done."""
    model: RewardModelConfig
    data: DataConfig
    margin: MarginConfig = field(default_factory=MarginConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.margin.kind != "none" and not LOSSES[self.loss.kind].takes_margins:
            raise ValueError(
                f"loss.kind = {self.loss.kind} has no place for a margin, but margin.kind = {self.margin.kind}; "
                "set margin.kind=none or take another loss"
            )
        fault = labels_fault(self.labels, self.data, None if LOSSES[self.loss.kind].has_opposite else self.loss.kind)
        if fault:
            raise ValueError(fault)
        check_queues(self.over_all_pairs, margin=self.margin, weights=self.weights)
        row = LOSSES[self.loss.kind]
        if self.model.heads > 1 and (row.statistics or row.inputs):
            raise ValueError(
                f"model.heads = {self.model.heads}, but loss.kind = {self.loss.kind} reads more of a batch than the "
                "rewards of its pairs, which are those of no single head: take another loss"
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
        return Workload(rows=self.data, kind="pairs", labels=self.labels, first_pass=self.over_all_pairs)

    @property
    def over_all_pairs(self) -> bool:
        """Whether margins, weights and means are taken over the whole global batch, in a first pass."""
        means = LOSSES[self.loss.kind].statistics and self.loss.scope == "global_batch"
        return self.margin.over_all_pairs or self.weights.over_all_pairs or bool(means)
