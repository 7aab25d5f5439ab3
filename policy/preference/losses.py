"""The objectives by name, what each takes, and the statistics of the whole batch that some of them take."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from policy.preference.batch_losses import (
    alpha_dpo_loss,
    amapo_loss,
    aot_loss,
    aot_unpaired_loss,
    bco_pair_loss,
    deviation,
    gamma_po_loss,
    gamma_targets,
    kto_loss,
    matched,
)
from policy.preference.length_losses import (
    cpo_loss,
    ipo_loss,
    orpo_loss,
    r_dpo_loss,
    sft_loss,
    sigmoid_norm_loss,
    simpo_loss,
)
from policy.preference.pair_losses import (
    apo_down_loss,
    apo_hinge_zero_loss,
    apo_softplus_zero_loss,
    apo_zero_loss,
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_sum_loss,
    margin_sigmoid_loss,
    nca_pair_loss,
    ot_margin_loss,
    robust_loss,
    sigmoid_loss,
    sppo_hard_loss,
)

INPUTS = (
    "chosen_logratios",
    "rejected_logratios",
    "chosen_logprobs",
    "rejected_logprobs",
    "chosen_lengths",
    "rejected_lengths",
    "logratios",
    "labels",
)
"""Per-pair tensors ``(B,)`` that losses take (see :mod:`policy.preference.pair_losses`); of "kto", per response."""

Columns = Mapping[str, Tensor]
Parameters = Mapping[str, float]


@dataclass(frozen=True)
class Objective:
    """A row of :data:`LOSSES`: a loss, and what it takes, read off its signature."""

    function: Callable[..., Tensor]
    reward: Literal["sum", "mean"] = "sum"
    """Whether beta times the log-ratio (without reference: the log-probability) of a response is its implicit
    reward as a sum over tokens or as their mean."""

    def __call__(self, **arguments) -> Tensor:
        """``(B,)`` losses; ``arguments`` are the :attr:`inputs`, :attr:`statistics`, :attr:`parameters` and margins.

        Raises:
            TypeError: if the loss has no place for an argument, or one that it needs is missing.
            ValueError: by the loss itself.
        """
        return self.function(**arguments)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Per-pair tensors it takes, of :data:`INPUTS`; margins are told by :attr:`takes_margins`."""
        return tuple(name for name in self._options if name in INPUTS)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What it takes of the whole batch, of :data:`STATISTICS`."""
        return tuple(name for name in self._options if name in STATISTICS)

    @property
    def parameters(self) -> dict[str, float]:
        """Hyper-parameters and their defaults."""
        options = self._options.items()
        return {name: option.default for name, option in options if isinstance(option.default, float)}

    @property
    def beta(self) -> float | None:
        """Default scale of the implicit reward; ``None`` where the loss has none."""
        return self.parameters.get("beta")

    @property
    def needs_reference(self) -> bool:
        return any(name.endswith("logratios") for name in self.inputs)

    @property
    def uses_lengths(self) -> bool:
        return any(name.endswith("_lengths") for name in self.inputs)

    @property
    def unpaired(self) -> bool:
        """Whether rows are single responses with a label instead of pairs."""
        return "labels" in self.inputs

    @property
    def takes_margins(self) -> bool:
        return "margins" in self._options

    @property
    def _options(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters


def _logratio_gap(columns: Columns) -> Tensor:
    return columns["chosen_logratios"] - columns["rejected_logratios"]


def _matched_reference(columns: Columns, parameters: Parameters) -> Tensor:
    policy = columns["chosen_logprobs"] - columns["rejected_logprobs"]
    return matched(policy, policy - _logratio_gap(columns))


def _per_token_gap(columns: Columns, kind: Literal["logprobs", "logratios"]) -> Tensor:
    chosen = columns[f"chosen_{kind}"] / columns["chosen_lengths"]
    return chosen - columns[f"rejected_{kind}"] / columns["rejected_lengths"]


STATISTICS: Mapping[str, Callable[[Columns, Parameters], Tensor]] = {
    "mean_logratio": lambda columns, _: (columns["chosen_logratios"] + columns["rejected_logratios"]).mean() / 2,
    "matched_reference": _matched_reference,
    "matched_rejected": lambda columns, _: matched(columns["chosen_logratios"], columns["rejected_logratios"]),
    "matched_chosen": lambda columns, _: matched(columns["rejected_logratios"], columns["chosen_logratios"]),
    "mean_gap": lambda columns, _: _per_token_gap(columns, "logprobs").mean(),
    "gap_deviation": lambda columns, _: deviation(_per_token_gap(columns, "logprobs")),
    "mean_shift": lambda columns, _: _per_token_gap(columns, "logratios").mean(),
    "shift_deviation": lambda columns, _: deviation(_per_token_gap(columns, "logratios")),
    "targets": lambda columns, parameters: gamma_targets(
        parameters["beta"] * _logratio_gap(columns), gamma=parameters["gamma"], tau=parameters["tau"]
    ),
    "kl": lambda columns, _: columns["mismatched_logratios"].mean(),
}
"""What losses take of the whole batch, from the ``(N,)`` columns of all its pairs and the loss's parameters: either
one number, or ``(N,)`` values of which each pair takes its own. Columns are :data:`INPUTS`; "kl" reads
"mismatched_logratios", those of responses paired with prompts they do not answer."""

RUNNING: Mapping[str, Literal["mean", "ema"]] = {
    "mean_logratio": "mean",
    "mean_shift": "ema",
    "shift_deviation": "ema",
}
"""Statistics that the caller carries over from batch to batch: as the mean over all pairs so far, or as a moving
average (decay 0.9 in the paper's code). Without that, each batch stands for itself."""

LOSSES: Mapping[str, Objective] = {
    "sigmoid": Objective(sigmoid_loss),
    "margin_sigmoid": Objective(margin_sigmoid_loss),
    "apo_hinge_zero": Objective(apo_hinge_zero_loss),
    "apo_softplus_zero": Objective(apo_softplus_zero_loss),
    "apo_zero": Objective(apo_zero_loss),
    "apo_down": Objective(apo_down_loss),
    "hinge": Objective(hinge_loss),
    "ipo": Objective(ipo_loss, reward="mean"),
    "ipo_sum": Objective(ipo_sum_loss),
    "exo_pair": Objective(exo_pair_loss),
    "nca_pair": Objective(nca_pair_loss),
    "robust": Objective(robust_loss),
    "bco_pair": Objective(bco_pair_loss),
    "sppo_hard": Objective(sppo_hard_loss),
    "aot": Objective(aot_loss),
    "aot_unpaired": Objective(aot_unpaired_loss),
    "discopop": Objective(discopop_loss),
    "sigmoid_norm": Objective(sigmoid_norm_loss, reward="mean"),
    "simpo": Objective(simpo_loss, reward="mean"),
    "sft": Objective(sft_loss, reward="mean"),
    "cpo": Objective(cpo_loss),
    "orpo": Objective(orpo_loss, reward="mean"),
    "r_dpo": Objective(r_dpo_loss),
    "amapo": Objective(amapo_loss, reward="mean"),
    "alpha_dpo": Objective(alpha_dpo_loss, reward="mean"),
    "gamma_po": Objective(gamma_po_loss),
    "kto": Objective(kto_loss),
    "ot_margin": Objective(ot_margin_loss),
}
