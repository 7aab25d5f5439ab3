"""The losses and margins of reward models by name, and what each takes. Known without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from rlhf.core.table import Parameter, Row

if TYPE_CHECKING:
    from torch import Tensor

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
BelowHalf = Annotated[float, Ge(0), Lt(0.5)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
RewardCost = Literal["abs", "signed"]
Reading = Literal["row", "row_sum", "pair", "max"]
Scope = Literal["micro_step", "global_batch"]


@dataclass(frozen=True)
class Loss(Row):
    """A row of :data:`LOSSES`; of each pair, it takes the chosen and the rejected reward, too."""

    statistics: tuple[str, ...] = field(default=(), kw_only=True)
    """Scalars of the whole batch it takes: means by :data:`reward.losses.STATISTICS`, and "pairs", their number."""
    takes_margins: bool = field(default=True, kw_only=True)

    @property
    def has_opposite(self) -> bool:
        """Whether the loss of the opposite label is that of the two answers swapped, all else as it is."""
        return not any("chosen" in name for name in (*self.inputs, *self.statistics))

    @property
    def arguments(self) -> frozenset[str]:
        margins = ("margins",) if self.takes_margins else ()
        return super().arguments | {"chosen", "rejected", *self.statistics, *margins}

    def __call__(
        self, chosen: "Tensor", rejected: "Tensor", margins: "Tensor | None" = None, **options: Any
    ) -> "Tensor":
        """``(B,)`` losses; ``options`` are inputs, statistics and hyper-parameters.

        Raises:
            ValueError: if margins are given to a loss that has no place for them, or by the loss itself.
        """
        if margins is None:
            return self.implementation(chosen, rejected, **options)
        if not self.takes_margins:
            raise ValueError(f"{self.function.partition(':')[2]} has no place for margins: pass None")
        return self.implementation(chosen, rejected, margins=margins, **options)


LOSSES: Mapping[str, Loss] = {
    "bradley_terry": Loss("reward.losses:bradley_terry_loss"),
    "label_smoothing": Loss(
        "reward.losses:label_smoothing_loss", parameters={"smoothing": Parameter(BelowHalf, 0.1)}
    ),
    "generalized_cross_entropy": Loss(
        "reward.losses:generalized_cross_entropy_loss",
        parameters={"q": Parameter(Annotated[float, Gt(0), Le(1)], 0.7)},
    ),
    "robust": Loss("reward.losses:robust_loss", parameters={"wrong_share": Parameter(BelowHalf, 0.1)}),
    "forward_robust": Loss(
        "reward.losses:forward_robust_loss", parameters={"wrong_share": Parameter(BelowHalf, 0.1)}
    ),
    "hinge": Loss("reward.losses:hinge_loss", parameters={"width": Parameter(NotNegative, 1.0)}),
    "focal": Loss(
        "reward.losses:focal_loss", takes_margins=False, parameters={"gamma": Parameter(NotNegative, 2.0)}
    ),
    "pos_reg": Loss(
        "reward.losses:pos_reg_loss",
        statistics=("mean_chosen",),
        parameters={"weight": Parameter(NotNegative, 0.1)},
    ),
    "centering": Loss("reward.losses:centering_loss", parameters={"coefficient": Parameter(NotNegative, 0.01)}),
    "norm_bt": Loss(
        "reward.losses:norm_bt_loss",
        inputs=("distances",),
        statistics=("mean_distance",),
        parameters={"max_weight": Parameter(Positive, 10.0)},
    ),
    "bsr": Loss(
        "reward.losses:bsr_loss",
        statistics=("mean_reward", "pairs"),
        parameters={"coefficient": Parameter(NotNegative, 0.001)},
    ),
    "grm_sft": Loss(
        "reward.losses:grm_sft_loss",
        inputs=("chosen_logprobs",),
        parameters={"weight": Parameter(BelowOne, 0.01), "beta": Parameter(Positive, 0.1)},
    ),
    "grm_dpo": Loss(
        "reward.losses:grm_dpo_loss",
        inputs=("chosen_logprobs", "rejected_logprobs"),
        optional=("reference_chosen_logprobs", "reference_rejected_logprobs"),
        parameters={"weight": Parameter(BelowOne, 0.01), "beta": Parameter(Positive, 0.1)},
    ),
}


@dataclass(frozen=True)
class Margin(Row):
    """A row of :data:`MARGINS`; its inputs are columns of :class:`reward.pairs.Pairs`."""

    @property
    def hyperparameters(self) -> Mapping[str, Parameter]:
        return {name: parameter for name, parameter in self.parameters.items() if name not in POOL}


POOL = {
    "scope": Parameter(
        Scope,
        "micro_step",
        "micro_step is the pairs that all ranks hold at once, plus the queue; global_batch exactly all pairs of the "
        "step, for one more forward pass: results then do not depend on ranks or micro-batches.",
    ),
    "queue_pairs": Parameter(
        Annotated[int, Ge(0)],
        0,
        "Recent pairs whose rejected rows join as further columns of the plan (with scope micro_step).",
    ),
}
"""Parameters of kinds that compare pairs with each other: which pairs those are. Read by the caller of the function."""

REWARD_WEIGHT = Parameter(NotNegative, 0.9, "Weight of the reward term in the cost.")
SEMANTIC_WEIGHT = Parameter(NotNegative, 0.1, "Weight of the cosine of the embeddings in the cost.")
REWARD_COST = Parameter(
    RewardCost,
    "abs",
    "With abs, hard is what has a small reward gap; with signed, what is ranked wrongly, too.",
)

EMBEDDINGS = ("chosen_embeddings", "rejected_embeddings")
REWARDS = ("chosen_rewards", "rejected_rewards")

MARGINS: Mapping[str, Margin] = {
    "none": Margin("reward.margins:no_margins", inputs=REWARDS),
    "constant": Margin(
        "reward.margins:constant_margins",
        inputs=REWARDS,
        parameters={"constant": Parameter(float, 0.5, "The margin of every pair, in logits.")},
    ),
    "column": Margin("reward.margins:column_margins", inputs=("data_margins",)),
    "similarity": Margin(
        "reward.margins:similarity_margins",
        inputs=EMBEDDINGS,
        parameters={"semantic_weight": SEMANTIC_WEIGHT},
    ),
    "reward": Margin(
        "reward.margins:reward_margins",
        inputs=REWARDS,
        parameters={"reward_weight": REWARD_WEIGHT, "reward_cost": REWARD_COST},
    ),
    "ot": Margin(
        "reward.margins:optimal_transport_margins",
        inputs=(*EMBEDDINGS, *REWARDS),
        optional=("chosen_weights", "rejected_weights"),
        parameters={
            "reward_weight": REWARD_WEIGHT,
            "semantic_weight": SEMANTIC_WEIGHT,
            "epsilon": Parameter(
                Positive, 0.1, "Entropic regularization of the transport plan, in units of the cost."
            ),
            "max_iterations": Parameter(Annotated[int, Gt(0)], 50, "Sinkhorn iterations at most."),
            "reward_cost": REWARD_COST,
            "center_rewards": Parameter(
                bool, True, "Take the mean reward of each pair out before comparing across pairs."
            ),
            "reading": Parameter(
                Reading,
                "row",
                "How a row of the plan becomes a margin: its mean cost, its raw sum, the pair's own cost without a "
                "plan, or the hardest opponent's.",
            ),
            **POOL,
        },
    ),
}
"""none. constant: the same for all. column: the data's margin column, else the gap of its scores. similarity: cosine
of the two answers. reward: the pair's own reward cost. ot: optimal transport over all pairs at hand."""

WEIGHTS: Mapping[str, Margin] = {
    "none": Margin("reward.weights:no_weights", inputs=REWARDS),
    "transport": Margin(
        "reward.weights:transport_weights",
        inputs=(*EMBEDDINGS, *REWARDS),
        parameters={
            "mass": Parameter(
                Annotated[float, Gt(0), Le(1)], 0.8, "Share of the pairs that the plan takes along; 1 weighs all alike."
            ),
            "reward_weight": REWARD_WEIGHT,
            "semantic_weight": SEMANTIC_WEIGHT,
            "epsilon": Parameter(Positive, 0.1, "Entropy of the plan, in units of the cost: blurs who stays behind."),
            "max_iterations": Parameter(Annotated[int, Gt(0)], 200, "Rounds of the solver at most."),
            "reward_cost": Parameter(
                RewardCost,
                "signed",
                "With signed, what is ranked wrongly stays behind; with abs, what has a small reward gap.",
            ),
            "center_rewards": Parameter(
                bool, True, "Take the mean reward of each pair out before comparing across pairs."
            ),
            **POOL,
        },
    ),
}
"""none. transport: by partial optimal transport over all pairs at hand, those that fit worst count less."""
