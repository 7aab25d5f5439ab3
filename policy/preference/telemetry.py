"""What is logged of a step and of a held-out evaluation, over the items of all ranks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import mannwhitneyu
from torch import Tensor

from policy.preference.columns import SIDES, RowSums, View, gathered_columns, implicit_rewards
from policy.preference.config import LossConfig
from reward.evaluate import Evaluation, evaluate_held_out, evaluation_table
from rlhf.core.errors import TrainingStopped
from rlhf.core.intervals import Accuracy, preference_accuracy
from rlhf.data.batching import Batch, ItemSource
from rlhf.data.preferences import PreferenceDataset
from rlhf.engine.ranks import Ranks

Columns = Mapping[str, Tensor]


class StepRows:
    """Collects what this rank saw of its items; gathered once, at the end."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.clear()

    def clear(self) -> None:
        self._positions: list[Tensor] = []
        self._views: list[View] = []
        self._extra: dict[str, list[Tensor]] = {}

    def add(self, batch: Batch, view: View, losses: Tensor | None = None, offset: int = 0) -> None:
        """``losses`` ``(B,)`` in training; ``offset`` is added to the positions."""
        extra = {} if view.drift is None else dict(zip(_DRIFT, view.drift, strict=True))
        extra |= {f"plain_{name}": values for name, values in view.plain.items()}
        if losses is not None:
            extra |= {"loss": losses.detach(), "has_gradient": _has_gradient(losses, view.sums)}
        for name, values in extra.items():
            self._extra.setdefault(name, []).append(values.detach())
        detached = {name: values.detach() for name, values in view.columns.items()}
        self._views.append(View(detached, {}, view.sums.detach(), None))
        self._positions.append(batch.positions + offset)

    def gathered(self) -> dict[str, Tensor]:
        """Columns of all ranks' items in order; every rank must call it."""
        extra = {name: torch.cat(parts) for name, parts in self._extra.items()}
        return gathered_columns(self._views, torch.cat(self._positions), self._ranks, **extra)[0]


_DRIFT = tuple(f"{side}_drift" for side in SIDES)


def _has_gradient(losses: Tensor, sums: RowSums) -> Tensor:
    parts = [part for part in (sums.head, sums.tail) if part.requires_grad]
    found = torch.autograd.grad(losses.sum(), parts, retain_graph=True, allow_unused=True)
    nonzero = [(slopes != 0).any(dim=0) for slopes in found if slopes is not None]
    return torch.stack(nonzero).any(dim=0).float() if nonzero else torch.zeros_like(losses)


def step_metrics(seen: Columns, loss: LossConfig, start: dict[str, float] | None) -> dict[str, float]:
    """Metrics of a step, from the ``(N,)`` columns that :meth:`StepRows.gathered` gives.

    Args:
        seen: all items of the step.
        loss: its main objective says what an implicit reward is.
        start: :func:`start_of` the first step, for the drift of runs without a reference.
    """
    metrics = {
        "loss": seen["loss"].mean(),
        "zero_gradient_share": 1 - seen["has_gradient"].mean(),
    }
    metrics |= _unpaired_metrics(seen, loss) if "labels" in seen else _pair_metrics(seen, loss)
    for side in SIDES[: 1 if "labels" in seen else 2]:
        tokens = seen[f"{side}_lengths"].sum()
        metrics[f"logprobs/{side}"] = seen[f"plain_{side}_logprobs"].mean()
        per_token = seen[f"plain_{side}_logprobs"].sum() / tokens
        metrics[f"logprobs/{side}_per_token"] = per_token
        if f"{side}_drift" in seen:
            metrics[f"logprobs/{side}_drift"] = seen[f"{side}_drift"].mean()
            metrics[f"logprobs/{side}_drift_per_token"] = seen[f"{side}_drift"].sum() / tokens
        elif start is not None:
            metrics[f"logprobs/{side}_drift_per_token"] = per_token - start[side]
    if "chosen_drift" in seen and "labels" not in seen:
        # The second-order estimate, from texts of the data: half the mean squared log-ratio of a response.
        metrics["kl"] = torch.cat([seen[name] for name in _DRIFT]).square().mean() / 2
    values = torch.stack([torch.as_tensor(value, device=seen["loss"].device).double() for value in metrics.values()])
    return {"pairs": float(len(seen["loss"]))} | dict(zip(metrics, values.tolist(), strict=True))


def start_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Log-probability per token of each side, to tell the drift of later steps."""
    return {side: metrics[f"logprobs/{side}_per_token"] for side in SIDES if f"logprobs/{side}_per_token" in metrics}


def _pair_metrics(seen: Columns, loss: LossConfig) -> dict[str, Tensor]:
    chosen, rejected = (implicit_rewards(seen, loss, side) for side in SIDES)
    gap = chosen - rejected
    return {
        "accuracy": ((gap > 0).double() + 0.5 * (gap == 0).double()).mean(),
        "gap": gap.mean(),
        "reward/chosen": chosen.mean(),
        "reward/rejected": rejected.mean(),
    }


def _unpaired_metrics(seen: Columns, loss: LossConfig) -> dict[str, Tensor]:
    rewards, labels = loss.beta * seen["logratios"], seen["labels"]
    kl = seen["mismatched_logratios"].mean().clamp_min(0)
    return {
        "accuracy": ((rewards > loss.beta * kl) == labels).double().mean(),
        "kl": kl,
        "reward/desirable": rewards[labels].mean(),
        "reward/undesirable": rewards[~labels].mean(),
    }


@dataclass(frozen=True, kw_only=True)
class UnpairedEvaluation:
    """How well implicit rewards tell desirable responses from others."""

    accuracy: Accuracy
    """Accuracy of the rule that a reward above that of the KL estimate means desirable."""
    auc: float | None
    """Share of (desirable, undesirable) couples in the right order; ``None`` if all have one label."""
    kl: float
    mean_desirable: float | None
    mean_undesirable: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


HeldOut = Evaluation | UnpairedEvaluation


def held_out_evaluation(seen: Columns, data: ItemSource, loss: LossConfig) -> tuple[HeldOut, dict[str, float]]:
    """The record, and the metrics for the log.

    Raises:
        TrainingStopped: if a log-probability is not finite.
    """
    for name, values in seen.items():
        bad = (~torch.isfinite(values.float())).nonzero().flatten().tolist()
        if bad:
            raise TrainingStopped(
                f"held-out {name} is not finite for {len(bad)} items, such as {data.item(bad[0]).row_id}: the policy "
                "has broken down. Lower optim.learning_rate, or publish an earlier checkpoint"
            )
    if "labels" in seen:
        unpaired = _evaluate_unpaired(seen, loss)
        return unpaired, {
            "eval/accuracy": unpaired.accuracy.value,
            "eval/auc": 0.5 if unpaired.auc is None else unpaired.auc,
            "eval/kl": unpaired.kl,
        }
    assert isinstance(data, PreferenceDataset)
    rewards = {side: implicit_rewards(seen, loss, side).cpu().numpy() for side in SIDES}
    record = evaluate_held_out(rewards["chosen"], rewards["rejected"], lengths=data.lengths, scores=data.scores)
    metrics = {"eval/accuracy": record.accuracy.value, "eval/loss": record.mean_loss, "eval/gap": record.mean_gap}
    for side in SIDES:
        tokens = seen[f"{side}_lengths"].sum()
        metrics[f"eval/{side}_logprob_per_token"] = float(seen[f"plain_{side}_logprobs"].sum() / tokens)
        if f"{side}_drift" in seen:
            metrics[f"eval/{side}_drift_per_token"] = float(seen[f"{side}_drift"].sum() / tokens)
    return record, metrics


def labeled_right(seen: Columns, loss: LossConfig) -> Tensor:
    """``(N,)`` bool: whether the rule of :attr:`UnpairedEvaluation.accuracy` gives an unpaired response its label."""
    kl = max(0.0, float(seen["mismatched_logratios"].mean()))
    return (loss.beta * seen["logratios"] > loss.beta * kl) == seen["labels"]


def _evaluate_unpaired(seen: Columns, loss: LossConfig) -> UnpairedEvaluation:
    rewards = (loss.beta * seen["logratios"]).cpu().numpy()
    labels = seen["labels"].cpu().numpy()
    kl = max(0.0, float(seen["mismatched_logratios"].mean()))
    good, bad = rewards[labels], rewards[~labels]
    both = len(good) and len(bad)
    return UnpairedEvaluation(
        accuracy=preference_accuracy(np.where(labeled_right(seen, loss).cpu().numpy(), 1.0, -1.0)),
        auc=float(mannwhitneyu(good, bad).statistic) / (len(good) * len(bad)) if both else None,
        kl=kl,
        mean_desirable=float(good.mean()) if len(good) else None,
        mean_undesirable=float(bad.mean()) if len(bad) else None,
    )


def print_evaluation(evaluation: HeldOut) -> None:
    """A table on the terminal."""
    if isinstance(evaluation, Evaluation):
        Console().print(evaluation_table(evaluation, title="Held-out evaluation of implicit rewards"))
        return
    table = Table(title="Held-out evaluation of implicit rewards", title_justify="left")
    for name in ("measure", "value", "95 % interval"):
        table.add_column(name)
    accuracy = evaluation.accuracy
    table.add_row("accuracy", f"{accuracy.value:.1%}", f"{accuracy.low:.1%} to {accuracy.high:.1%}")
    for name in ("auc", "kl", "mean_desirable", "mean_undesirable"):
        value = getattr(evaluation, name)
        table.add_row(name, "-" if value is None else f"{value:.4f}", "")
    Console().print(table)
