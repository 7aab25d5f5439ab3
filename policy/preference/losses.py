"""The objectives by name, and what each takes. Known without torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from rlhf.core.table import Parameter, Row

if TYPE_CHECKING:
    from torch import Tensor

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
BelowHalf = Annotated[float, Ge(0), Lt(0.5)]
InnerHalf = Annotated[float, Gt(0), Lt(0.5)]
BelowLog2 = Annotated[float, Ge(0), Lt(math.log(2))]

RATIOS = ("chosen_logratios", "rejected_logratios")
LOGPROBS = ("chosen_logprobs", "rejected_logprobs")
LENGTHS = ("chosen_lengths", "rejected_lengths")


@dataclass(frozen=True)
class Objective(Row):
    """A row of :data:`LOSSES`; its inputs are per-pair tensors ``(B,)`` (see :mod:`policy.preference.pair_losses`), of
    "kto" per response."""

    statistics: tuple[str, ...] = field(default=(), kw_only=True)
    """What it takes of the whole batch, of :data:`policy.preference.batch_losses.STATISTICS`."""
    takes_margins: bool = field(default=False, kw_only=True)
    likelihood: Literal["", "alone", "beside"] = field(default="", kw_only=True)
    """Whether the likelihood of the chosen response is all of it, or a term of its own. It is that of the whole text:
    the tail weight of LD-DPO changes what pairs are compared by, and not this."""
    reward: Literal["sum", "mean"] = field(default="sum", kw_only=True)
    """Whether beta times the log-ratio (without reference: the log-probability) of a response is its implicit
    reward as a sum over tokens or as their mean."""

    @property
    def arguments(self) -> frozenset[str]:
        return super().arguments | {*self.statistics, *(("margins",) if self.takes_margins else ())}

    def __call__(self, **arguments: Any) -> "Tensor":
        """``(B,)`` losses; ``arguments`` are inputs, statistics, hyper-parameters and margins.

        Raises:
            TypeError: if the loss has no place for an argument, or one that it needs is missing.
            ValueError: by the loss itself.
        """
        return self.implementation(**arguments)

    @property
    def needs_reference(self) -> bool:
        return any(name.endswith("logratios") for name in self.inputs)

    @property
    def has_opposite(self) -> bool:
        """Whether the loss of the opposite label is that of the two answers swapped, all else as it is."""
        return not self.statistics and not self.unpaired

    @property
    def unpaired(self) -> bool:
        """Whether rows are single responses with a label instead of pairs."""
        return "labels" in self.inputs


LOSSES: Mapping[str, Objective] = {
    "sigmoid": Objective(
        "policy.preference.pair_losses:sigmoid_loss",
        inputs=RATIOS,
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1), "smoothing": Parameter(BelowHalf, 0.0)},
    ),
    "margin_sigmoid": Objective(
        "policy.preference.pair_losses:margin_sigmoid_loss",
        inputs=RATIOS,
        parameters={
            "beta": Parameter(Positive, 0.1),
            "delta": Parameter(BelowLog2, 0.1),
            "smoothing": Parameter(BelowHalf, 0.0),
            "gate": Parameter(bool | None, None),
        },
    ),
    "apo_hinge_zero": Objective(
        "policy.preference.pair_losses:apo_hinge_zero_loss",
        inputs=RATIOS,
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1), "margin": Parameter(NotNegative, 1.0)},
    ),
    "apo_softplus_zero": Objective(
        "policy.preference.pair_losses:apo_softplus_zero_loss",
        inputs=RATIOS,
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.3), "margin": Parameter(NotNegative, 1.0)},
    ),
    "apo_zero": Objective(
        "policy.preference.pair_losses:apo_zero_loss",
        inputs=RATIOS,
        parameters={"beta": Parameter(Positive, 0.1)},
    ),
    "apo_down": Objective(
        "policy.preference.pair_losses:apo_down_loss",
        inputs=RATIOS,
        parameters={"beta": Parameter(Positive, 0.1)},
    ),
    "hinge": Objective(
        "policy.preference.pair_losses:hinge_loss",
        inputs=RATIOS,
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1), "width": Parameter(NotNegative, 1.0)},
    ),
    "ipo": Objective(
        "policy.preference.length_losses:ipo_loss",
        inputs=(*RATIOS, *LENGTHS),
        reward="mean",
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1)},
    ),
    "ipo_sum": Objective(
        "policy.preference.pair_losses:ipo_sum_loss",
        inputs=RATIOS,
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1)},
    ),
    "exo_pair": Objective(
        "policy.preference.pair_losses:exo_pair_loss",
        inputs=RATIOS,
        parameters={"beta": Parameter(Positive, 0.1), "smoothing": Parameter(InnerHalf, 0.001)},
    ),
    "nca_pair": Objective(
        "policy.preference.pair_losses:nca_pair_loss",
        inputs=RATIOS,
        parameters={"beta": Parameter(Positive, 0.01)},
    ),
    "robust": Objective(
        "policy.preference.pair_losses:robust_loss",
        inputs=RATIOS,
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1), "smoothing": Parameter(BelowHalf, 0.1)},
    ),
    "bco_pair": Objective(
        "policy.preference.batch_losses:bco_pair_loss",
        inputs=RATIOS,
        statistics=("mean_logratio",),
        parameters={"beta": Parameter(Positive, 0.1)},
    ),
    "sppo_hard": Objective(
        "policy.preference.pair_losses:sppo_hard_loss",
        inputs=RATIOS,
        parameters={"beta": Parameter(Positive, 0.001)},
    ),
    "aot": Objective(
        "policy.preference.batch_losses:aot_loss",
        inputs=(*LOGPROBS, *RATIOS),
        statistics=("matched_reference",),
        parameters={"beta": Parameter(Positive, 0.01), "smoothing": Parameter(BelowHalf, 0.0)},
    ),
    "aot_unpaired": Objective(
        "policy.preference.batch_losses:aot_unpaired_loss",
        inputs=RATIOS,
        statistics=("matched_rejected", "matched_chosen"),
        parameters={"beta": Parameter(Positive, 0.01), "smoothing": Parameter(BelowHalf, 0.0)},
    ),
    "discopop": Objective(
        "policy.preference.pair_losses:discopop_loss",
        inputs=RATIOS,
        parameters={"beta": Parameter(Positive, 0.05), "tau": Parameter(Positive, 0.05)},
    ),
    "sigmoid_norm": Objective(
        "policy.preference.length_losses:sigmoid_norm_loss",
        inputs=(*RATIOS, *LENGTHS),
        reward="mean",
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 5.0)},
    ),
    "simpo": Objective(
        "policy.preference.length_losses:simpo_loss",
        inputs=(*LOGPROBS, *LENGTHS),
        reward="mean",
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 2.0), "gamma": Parameter(float, 1.0)},
    ),
    "sft": Objective(
        "policy.preference.length_losses:sft_loss",
        inputs=("chosen_logprobs", "chosen_lengths"),
        likelihood="alone",
        reward="mean",
    ),
    "cpo": Objective(
        "policy.preference.length_losses:cpo_loss",
        inputs=(*LOGPROBS, "chosen_lengths"),
        likelihood="beside",
        takes_margins=True,
        parameters={
            "beta": Parameter(Positive, 0.1),
            "nll_weight": Parameter(NotNegative, 1.0),
            "smoothing": Parameter(BelowHalf, 0.0),
        },
    ),
    "orpo": Objective(
        "policy.preference.length_losses:orpo_loss",
        inputs=(*LOGPROBS, *LENGTHS),
        likelihood="beside",
        reward="mean",
        parameters={"weight": Parameter(NotNegative, 0.1)},
    ),
    "r_dpo": Objective(
        "policy.preference.length_losses:r_dpo_loss",
        inputs=(*RATIOS, *LENGTHS),
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1), "alpha": Parameter(NotNegative, 0.005)},
    ),
    "amapo": Objective(
        "policy.preference.batch_losses:amapo_loss",
        inputs=(*LOGPROBS, *LENGTHS),
        statistics=("mean_gap", "gap_deviation"),
        reward="mean",
        parameters={"beta": Parameter(Positive, 2.0)},
    ),
    "alpha_dpo": Objective(
        "policy.preference.batch_losses:alpha_dpo_loss",
        inputs=(*LOGPROBS, *RATIOS, *LENGTHS),
        statistics=("mean_shift", "shift_deviation"),
        reward="mean",
        parameters={
            "beta": Parameter(Positive, 10.0),
            "gamma_ratio": Parameter(float, 0.4),
            "alpha": Parameter(float, 0.1),
        },
    ),
    "gamma_po": Objective(
        "policy.preference.batch_losses:gamma_po_loss",
        inputs=RATIOS,
        statistics=("targets",),
        parameters={
            "beta": Parameter(Positive, 0.1),
            "gamma": Parameter(Positive, 0.1),
            "tau": Parameter(Positive, 10.0),
        },
    ),
    "kto": Objective(
        "policy.preference.batch_losses:kto_loss",
        inputs=("logratios", "labels"),
        statistics=("kl",),
        parameters={
            "beta": Parameter(Positive, 0.1),
            "desirable_weight": Parameter(NotNegative, 1.0),
            "undesirable_weight": Parameter(NotNegative, 1.0),
        },
    ),
    "madpo": Objective(
        "policy.preference.pair_losses:madpo_loss",
        inputs=(*RATIOS, "data_margins"),
        parameters={
            "beta": Parameter(Positive, 0.1),
            "largest": Parameter(Annotated[float, Gt(1)], 2.0),
            "smallest": Parameter(Annotated[float, Gt(0), Lt(1)], 0.5),
            "steepness": Parameter(Positive, 1.0),
            "threshold": Parameter(Positive, 2.0),
        },
    ),
    "ot_margin": Objective(
        "policy.preference.pair_losses:ot_margin_loss",
        inputs=RATIOS,
        takes_margins=True,
        parameters={"beta": Parameter(Positive, 0.1)},
    ),
}

DIVERGENCE_LOSSES = frozenset(
    {
        *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"),
        *("margin_sigmoid", "ipo_sum", "r_dpo", "gamma_po", "ot_margin", "madpo"),
        "sft",
    }
)
"""Objectives that may be given other scores than "reverse_kl": those of the difference of the two scores alone, in
which the divergence's unknown offset cancels; and "sft", which reads no ratio and may stand beside them in a sum."""
