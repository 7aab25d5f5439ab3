"""The recipe of the preference stage."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from policy.options import PolicyConfig
from policy.preference.losses import DIVERGENCE_LOSSES, LOSSES, Objective
from policy.roles import policy_role, reference_role
from reward.config import MarginConfig, WeightConfig, check_queues, labels_fault
from rlhf.core.annotations import NoResult
from rlhf.core.table import listed, parameter_values
from rlhf.data.options import DataConfig, ExampleDataConfig, LabelsConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.roles import ModelRole
from rlhf.train.options import TrainConfig
from rlhf.train.workload import Workload


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """A further objective of a weighted sum."""

    kind: str
    """A name of policy.preference.losses.LOSSES; sft is the likelihood of the chosen response."""
    parameters: Annotated[dict[str, Any], listed(LOSSES)] = field(default_factory=dict)
    """Hyper-parameters of that objective."""
    weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the objective in the sum."""

    def __post_init__(self) -> None:
        _ = self.values  # refuses what the objective does not take

    @cached_property
    def values(self) -> dict[str, Any]:
        """All hyper-parameters of the objective."""
        return parameter_values(LOSSES, self.kind, self.parameters, noun="objective")


def _is_sorted(term: TermConfig) -> bool:
    """Whether an objective compares sorted values, of which none is that of a pair."""
    return term.kind in ("aot", "aot_unpaired")


def _check_rest(term: TermConfig) -> None:
    """Have recipes say what smoothing does to the pairs that margin_sigmoid is to leave alone.

    Raises:
        ValueError: if they do not, or if no pair could come to rest.
    """
    values = term.values
    delta, smoothing, gate = (values.get(name) for name in ("delta", "smoothing", "gate"))
    if not delta or not smoothing:
        return
    if gate is None:
        raise ValueError(
            f"smoothing = {smoothing} with delta = {delta}: pairs that are told apart well enough would not rest, but "
            "be pushed back. Set smoothing=0 or gate=true, with which they rest, or gate=false, with which none does"
        )
    least = -math.log1p(-smoothing)
    if gate and delta <= least:
        raise ValueError(
            f"delta = {delta} with smoothing = {smoothing}: pairs stop where their loss is {least:.3f}, so that none "
            "comes to rest; take a larger delta, or less smoothing"
        )


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """How the tolerance delta of Adaptive Margin-Sigmoid moves during the run."""

    schedule: Literal["constant", "warmup", "quantile"] = "constant"
    """constant. warmup: from 0 to the objective's delta. quantile: the objective's delta, and less where more pairs
    than `quantile` would fall below it: a moving average of that quantile of their losses."""
    warmup_share: Annotated[float, Gt(0), Le(1)] = 0.3
    """Share of the run over which warmup rises."""
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of the pairs, about, that may fall below delta and so rest."""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the moving average per step."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective and what modifies it."""

    kind: str = "apo_hinge_zero"
    """A name of policy.preference.losses.LOSSES."""
    parameters: Annotated[dict[str, Any], listed(LOSSES)] = field(default_factory=dict)
    """Hyper-parameters of that objective, by name; what is not given has the objective's default."""
    weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the objective, where others are added."""
    add: tuple[TermConfig, ...] = ()
    """Further objectives of a weighted sum (MPO: sigmoid .8, bco_pair .2, sft 1)."""
    nll_weight: Annotated[float, Ge(0)] = 0.0
    """Weight of the negative log-likelihood per token of the chosen response (RPO): keeps it from falling."""
    wpo: bool = False
    """Weight pairs by how likely the policy is to write them (WPO)."""
    wpo_max: Annotated[float, Gt(0)] | None = 1.0
    """Bound on these weights, 1 in the authors' code; null for none."""
    tail_weight: Annotated[float, Ge(0), Le(1)] = 1.0
    """Weight of the tokens that the longer response has beyond the shorter one (LD-DPO's alpha); 1 is none."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """The f-divergence that keeps the policy near the reference."""
    divergence_alpha: float = 0.5
    """Order of the alpha divergence."""
    delta: DeltaConfig = field(default_factory=DeltaConfig)
    """Schedule of margin_sigmoid's delta."""
    scope: Literal["micro_step", "global_batch"] = "micro_step"
    """Pairs that batch statistics are taken over (amapo, alpha_dpo, aot, gamma_po, bco_pair, kto, ot_margin):
    micro_step: those that all ranks hold at once. global_batch: exactly all pairs of the step, for one more
    forward pass; results then do not depend on ranks or micro-batches."""

    def __post_init__(self) -> None:
        _ = self.values  # refuses what the objective does not take
        terms = self.terms
        if self.divergence != "reverse_kl":
            unfit = sorted({term.kind for term in terms} - set(DIVERGENCE_LOSSES))
            if unfit:
                raise ValueError(f"divergence = {self.divergence} is not defined for {', '.join(unfit)}")
        if self.delta.schedule != "constant" and not any("delta" in LOSSES[term.kind].parameters for term in terms):
            raise ValueError(f"delta.schedule = {self.delta.schedule}, but {self.kind} has no delta")
        modified = len(terms) > 1 or self.nll_weight or self.wpo or self.tail_weight != 1
        if modified and any(LOSSES[term.kind].unpaired for term in terms):
            raise ValueError("kto stands alone: no add, nll_weight, wpo or tail_weight")
        if self.wpo and any(map(_is_sorted, terms)):
            raise ValueError("wpo weights single pairs, and aot compares sorted ones")
        beside = [term.kind for term in terms if LOSSES[term.kind].likelihood == "beside"]
        if self.tail_weight != 1 and beside:
            raise ValueError(
                f"tail_weight = {self.tail_weight} would weight the likelihood term inside {beside[0]}, too; take "
                "simpo or sigmoid, and nll_weight beside it"
            )
        for term in terms:
            _check_rest(term)

    @cached_property
    def values(self) -> dict[str, Any]:
        """All hyper-parameters of the main objective."""
        return parameter_values(LOSSES, self.kind, self.parameters, noun="objective")

    @property
    def terms(self) -> tuple[TermConfig, ...]:
        """All objectives of the sum, the main one first."""
        return (TermConfig(kind=self.kind, parameters=self.parameters, weight=self.weight), *self.add)

    @property
    def objective(self) -> Objective:
        return LOSSES[self.kind]

    @property
    def beta(self) -> float:
        """Scale of the implicit reward; 1 for objectives without a beta."""
        return self.values.get("beta", 1.0)

    @property
    def needs_reference(self) -> bool:
        return any(LOSSES[term.kind].needs_reference for term in self.terms)

    @property
    def reads_data_margins(self) -> bool:
        """Whether an objective reads the margins of the data themselves."""
        return any("data_margins" in LOSSES[term.kind].inputs for term in self.terms)

    @property
    def takes_margins(self) -> bool:
        return any(LOSSES[term.kind].takes_margins for term in self.terms)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The model that the policy is compared with."""

    kind: Literal["auto", "cache", "live", "none"] = "auto"
    """cache: its log-probabilities are computed once and kept on disk, for all epochs and objectives. live: the model
    is asked in every step (with LoRA: the base with its adapter off). none: for objectives without a reference.
    auto: cache, or none where the objective needs none."""
    path: str | None = None
    """Another model than the one training starts from; it must share its tokenizer."""
    cache: Annotated[Path | None, NoResult()] = None
    """A cache folder to use, refused if it belongs to other data or another model; null finds its place by content."""
    shard_pairs: Annotated[int, Gt(0), NoResult()] = 256
    """Pairs per file of a new cache: what a kill can cost."""
    verify_pairs: Annotated[int, Ge(0), NoResult()] = 4
    """Pairs of the cache that are computed again at the start and compared; 0 trusts it."""
    placement: str = "replicated"
    """Where a second model lives: replicated (whole on every rank), zero3, zero3_offload, or a DeepSpeed JSON."""
    sync_every: Annotated[int, Ge(0)] = 0
    """Steps between moves of a live reference towards the policy (TR-DPO); 0 never moves it."""
    sync_share: Annotated[float, Gt(0), Le(1)] = 0.6
    """Share of the way that a move goes: 1 copies the policy."""

    def __post_init__(self) -> None:
        if self.sync_every and self.kind != "live":
            raise ValueError(f"sync_every = {self.sync_every} needs kind = live: a cache cannot move with the policy")
        if self.cache is not None and self.kind not in ("auto", "cache"):
            raise ValueError(f"cache = {self.cache}, but kind = {self.kind}")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When to speak up about a run that goes wrong."""

    chosen_drop: Annotated[float, Gt(0)] = 0.3
    """Fall of the chosen responses' log-probability since the start, in nats per token."""
    zero_gradient_share: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of pairs that no longer have a gradient."""
    action: Literal["warn", "stop", "none"] = "warn"
    """warn once for each symptom; or stop the run."""


NO_MARGIN = MarginConfig(kind="none")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """A run of the preference stage."""

    output: Annotated[Path, NoResult()]
    """Run folder: config, logs, checkpoints, and final/ when done."""
    model: PolicyConfig
    data: DataConfig | None = None
    """Preference pairs."""
    unpaired: ExampleDataConfig | None = None
    """Single responses with a label, for kto; in place of data."""
    loss: LossConfig = field(default_factory=LossConfig)
    margin: MarginConfig | None = None
    """The margin of objectives that have a place for one (null: none; of ot_margin, optimal transport with its
    defaults)."""
    weights: WeightConfig = field(default_factory=WeightConfig)
    """How much pairs count."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    optim: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        loss, reference = self.loss, self.reference
        wanted, other = ("unpaired", "data") if loss.objective.unpaired else ("data", "unpaired")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"loss.kind = {loss.kind} reads its rows from the section {wanted}, and not from {other}")
        if loss.needs_reference and reference.kind == "none":
            raise ValueError(f"reference.kind = none, but {loss.kind} compares with a reference; set cache or live")
        asks = reference.kind in ("cache", "live") or reference.cache is not None or reference.path is not None
        if asks and not loss.needs_reference:
            raise ValueError(f"loss.kind = {loss.kind} has no reference: leave the section reference out")
        if self.margin is not None and not loss.takes_margins:
            raise ValueError(f"loss.kind = {loss.kind} has no place for a margin; remove the section or use ot_margin")
        own = next((term.kind for term in loss.terms if "margin" in LOSSES[term.kind].parameters), None)
        if own and self.margin is not None and self.margin.kind != "column":
            raise ValueError(
                f"loss.kind = {own} has a margin of its own (loss.parameters.margin), and beside it no place for a "
                f"margin but that of the data: margin.kind = column, not {self.margin.kind}"
            )
        if self.weights.kind != "none" and (self.data is None or any(map(_is_sorted, loss.terms))):
            raise ValueError(f"weights.kind = {self.weights.kind} weighs pairs, and loss.kind = {loss.kind} reads none")
        check_queues(self.over_all_pairs, margin=self.margins, weights=self.weights)
        one_sided = next((term.kind for term in loss.terms if not LOSSES[term.kind].has_opposite), None)
        if self.data is None and self.labels.kind != "as_given":
            raise ValueError(f"labels.kind = {self.labels.kind} is for pairs, and the section unpaired has none")
        swaps = self.data is not None and (self.data.flip_labels or self.labels_swapped)
        if loss.reads_data_margins and swaps:
            raise ValueError(
                "madpo reads margins of the data as rewards of the chosen answer less those of the other, which labels "
                "swapped by data.flip_labels or labels.use=swap no longer are: swap them in the file, or take soft ones"
            )
        if self.data is not None and (fault := labels_fault(self.labels, self.data, one_sided)):
            raise ValueError(fault)
        if reference.sync_every and self.model.lora is not None:
            raise ValueError("reference.sync_every moves whole weights; it does not go with model.lora")

    @property
    def rows(self) -> DataConfig | ExampleDataConfig:
        """The section that rows come from."""
        rows = self.unpaired if self.data is None else self.data
        assert rows is not None
        return rows

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """The models of the run: the policy and, if the objective needs one, the reference.

        The reference is the policy itself where its cache is filled before the first step, or where its adapters can be
        switched off.
        """
        policy, reference = policy_role(self.model, "model", self.optim, self.engine), self.reference
        if not self.loss.needs_reference:
            return (policy,)
        live = reference.kind == "live"
        inside = reference.path is None and (not live or self.model.lora is not None)
        return policy, reference_role(policy, reference.path, reference.placement, inside=inside, stays=live)

    @property
    def workload(self) -> Workload:
        """What a step computes."""
        cached = self.loss.needs_reference and self.reference.kind != "live"
        return Workload(
            rows=self.rows,
            kind="unpaired" if self.data is None else "pairs",
            labels=self.labels,
            first_pass=self.over_all_pairs,
            cached_numbers=2 if cached else 0,
        )

    @property
    def labels_swapped(self) -> bool:
        return self.labels.kind != "as_given" and self.labels.use == "swap"

    @property
    def margins(self) -> MarginConfig:
        if self.margin is not None:
            return self.margin
        return MarginConfig() if any(term.kind == "ot_margin" for term in self.loss.terms) else NO_MARGIN

    @property
    def reads_margins(self) -> str:
        """The setting that needs a margin of every training pair; empty if none does."""
        if self.loss.reads_data_margins:
            return "loss.kind = madpo"
        return "margin.kind = column" if self.makes_margins and "data_margins" in self.margins.row.inputs else ""

    @property
    def makes_margins(self) -> bool:
        return self.loss.takes_margins and self.margins.kind != "none"

    @property
    def looks_at_pairs(self) -> bool:
        """Whether margins or weights are made of rewards and states of all pairs at hand."""
        return self.makes_margins or self.weights.kind != "none"

    @property
    def over_all_pairs(self) -> bool:
        """Whether statistics are taken over the whole global batch, in a first pass."""
        if (self.makes_margins and self.margins.over_all_pairs) or self.weights.over_all_pairs:
            return True
        statistics = any(LOSSES[term.kind].statistics for term in self.loss.terms)
        return self.loss.scope == "global_batch" and (statistics or self.looks_at_pairs)
