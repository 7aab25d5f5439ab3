"""Columns of a batch: the per-pair numbers that objectives read, from log-probabilities of policy and reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.model import PolicyOutput
from policy.preference.config import LossConfig
from policy.preference.modifiers import divergence_scores, length_desensitized
from rlhf.data.batching import Batch
from rlhf.engine.ranks import Ranks

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class RowSums:
    """Log-probabilities of B items of S rows, summed over response tokens."""

    head: Tensor
    """``(S, B)`` over the tokens up to the length of the shortest response of the item."""
    tail: Tensor
    """``(S, B)`` over the tokens beyond."""

    def detach(self) -> "RowSums":
        return RowSums(self.head.detach(), self.tail.detach())


def row_sums(output: PolicyOutput, batch: Batch) -> RowSums:
    """Sum what the policy says of each token of ``batch``; with gradient."""
    masks = [bucket.response_mask[:, 1:] for bucket in batch.buckets]
    shared = _shared_lengths(masks, batch)
    totals, heads = [], []
    for values, mask, limit in zip(output.logprobs, masks, shared, strict=True):
        totals.append(values.sum(dim=1))
        within = mask & (mask.cumsum(dim=1) <= limit[:, None])
        heads.append((values * within).sum(dim=1))
    total, head = (torch.stack(batch.sides(torch.cat(parts))) for parts in (totals, heads))
    return RowSums(head, total - head)


def response_lengths(batch: Batch) -> Tensor:
    """``(S, B)`` float32 number of response tokens."""
    counts = torch.cat([bucket.response_mask[:, 1:].sum(dim=1) for bucket in batch.buckets])
    return torch.stack(batch.sides(counts)).float()


@dataclass(frozen=True)
class View:
    """What the objectives read of B items."""

    columns: dict[str, Tensor]
    """``(B,)`` each, by the names of objectives' inputs (policy.preference.losses); with gradient."""
    plain: dict[str, Tensor]
    """``chosen_logprobs`` and ``rejected_logprobs`` of whole responses, whatever the tail weight; with gradient."""
    sums: RowSums
    """Summed log-probabilities, through which all gradient passes."""
    drift: Tensor | None
    """``(S, B)`` plain log-ratios to the reference, without gradient; ``None`` without a reference."""

    @property
    def opposite(self) -> "View":
        """The same pairs with the opposite labels; ``sums`` and ``drift`` stay in the order of the rows."""
        columns = _swapped(self.columns)
        if "data_margins" in columns:
            columns["data_margins"] = -columns["data_margins"]
        return replace(self, columns=columns, plain=_swapped(self.plain))


def view(policy: RowSums, reference: RowSums | None, batch: Batch, loss: LossConfig) -> View:
    """Put together what ``loss`` can read of ``batch``."""
    logprobs = length_desensitized(policy.head, policy.tail, loss.tail_weight)
    columns = _by_side("logprobs", logprobs) | _by_side("lengths", response_lengths(batch))
    plain = _by_side("logprobs", policy.head + policy.tail)
    drift = None
    if reference is not None:
        ratios = logprobs - length_desensitized(reference.head, reference.tail, loss.tail_weight)
        columns |= _by_side("logratios", divergence_scores(ratios, loss.divergence, loss.divergence_alpha))
        drift = (policy.head + policy.tail - reference.head - reference.tail).detach()
    if batch.margins is not None and loss.reads_data_margins:
        columns["data_margins"] = batch.margins
    if batch.labels is not None:
        columns["labels"] = batch.labels
        columns["logratios"] = columns.pop("chosen_logratios")
        columns["mismatched_logratios"] = columns.pop("rejected_logratios").detach()
    return View(columns, plain, policy, drift)


def implicit_rewards(columns: Mapping[str, Tensor], loss: LossConfig, side: str) -> Tensor:
    """``(B,)`` implicit rewards of one side of pairs, as the main objective reads them; without gradient.

    beta times the log-ratio, or without a reference the log-probability: summed, or by token where the objective
    takes means.
    """
    values = columns[f"{side}_{'logratios' if loss.objective.needs_reference else 'logprobs'}"]
    if loss.objective.reward == "mean":
        values = values / columns[f"{side}_lengths"]
    return loss.beta * values.detach().float()


def gathered_columns(
    views: Sequence[View], positions: Tensor, ranks: Ranks, **extra: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Columns of the items of all ranks, float32 and without gradient, in the order of their positions.

    Args:
        views: of this rank's items, B together.
        positions: ``(B,)`` int64 of these items.
        ranks: every one of them must call it.
        extra: further ``(B,)`` columns of these items.
    Returns:
        ``(N,)`` columns by name, and the ``(N,)`` positions.
    """
    columns = {name: torch.cat([view.columns[name].detach().float() for view in views]) for name in views[0].columns}
    columns |= {name: values.detach().float() for name, values in extra.items()}
    names = sorted(columns)
    # Positions travel as float32, which is exact below 2**24 items in a global batch.
    rows = ranks.gather_rows(torch.stack([positions.float(), *(columns[name] for name in names)], dim=1))
    rows = rows[rows[:, 0].argsort()]
    gathered = dict(zip(names, rows[:, 1:].unbind(dim=1), strict=True))
    if "labels" in gathered:
        gathered["labels"] = gathered["labels"] > 0
    return gathered, rows[:, 0].long()


def _swapped(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    other = {"chosen": "rejected", "rejected": "chosen"}
    parts = {name: name.partition("_") for name in columns}
    return {other.get(side, side) + rest[0] + rest[1]: columns[name] for name, (side, *rest) in parts.items()}


def _by_side(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{side}_{name}": each for side, each in zip(SIDES, values, strict=True)}


def _shared_lengths(masks: list[Tensor], batch: Batch) -> list[Tensor]:
    """``(R_b,)`` for each bucket: the length of the shortest response of the item that a row belongs to."""
    lengths = torch.cat([mask.sum(dim=1) for mask in masks])
    shortest = torch.stack(batch.sides(lengths)).amin(dim=0)
    lengths[batch.order] = shortest.repeat(batch.rows_per_item)
    return list(lengths.split([len(mask) for mask in masks]))
