"""Global batches of an exact number of pairs, packed into micro-batches under a token budget.

A step is one global batch. Its pairs are sorted by length and cut into micro-batches whose padded tokens
stay under the budget; each micro-batch is computed as a few row groups, each padded to its own longest
row, so that the short answer of a pair does not pay for the long one. Every rank makes the same plan
from the same lengths, so no communication is needed and all ranks run the same number of forwards.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.core.masking import length_mask


class PairSource(Protocol):
    """Where the tokens of a pair come from; ``rlhf.data.preferences.PreferenceDataset`` is one."""

    lengths: np.ndarray  # (N, 2) tokens of the chosen and of the rejected row

    def pair(self, index: int): ...


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """Which pairs a rank computes together, and in which row groups.

    ``pairs`` are positions in the global batch. Row ``k`` of ``groups`` is the chosen side of
    ``pairs[k]`` for ``k < B`` and the rejected side of ``pairs[k - B]`` otherwise. A plan without
    pairs is filler: it keeps a rank in step and weighs nothing.
    """

    pairs: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    padded_tokens: int


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Rows of one padded block."""

    tokens: Tensor  # (R, T) int64, right-padded
    token_mask: Tensor  # (R, T) bool, True on real tokens
    response_mask: Tensor  # (R, T) bool, True on response tokens, the end token included

    def to(self, device: torch.device) -> "RowGroup":
        return RowGroup(
            tokens=self.tokens.to(device),
            token_mask=self.token_mask.to(device),
            response_mask=self.response_mask.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """B pairs as 2B rows spread over row groups.

    ``order`` puts the rows back: indexing the concatenated outputs of all groups by it gives the B
    chosen rows, then the B rejected rows of the same prompts. Filler has ``B = 0``.
    """

    groups: tuple[RowGroup, ...]
    order: Tensor  # (2B,) int64
    positions: Tensor  # (B,) int64, places of the pairs in the global batch
    row_ids: tuple[str, ...]
    margins: Tensor | None  # (B,) float32, the data's own margin column
    score_gaps: Tensor | None  # (B,) float32, chosen score minus rejected score

    def __len__(self) -> int:
        return len(self.row_ids)

    def to(self, device: torch.device) -> "PreferenceBatch":
        def move(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return PreferenceBatch(
            groups=tuple(group.to(device) for group in self.groups),
            order=self.order.to(device),
            positions=self.positions.to(device),
            row_ids=self.row_ids,
            margins=move(self.margins),
            score_gaps=move(self.score_gaps),
        )


def global_batch(step: int, *, pairs: int, batch_pairs: int, seed: int) -> np.ndarray:
    """Dataset indices of the global batch of ``step`` (counted from 0 over all epochs).

    Every epoch is a new seeded order of all pairs; its last batch may be smaller. The position in
    the data is the step number alone, so resuming needs no other state.
    """
    steps = steps_per_epoch(pairs, batch_pairs)
    epoch, place = divmod(step, steps)
    order = np.random.default_rng((seed, epoch)).permutation(pairs)
    return order[place * batch_pairs : (place + 1) * batch_pairs]


def steps_per_epoch(pairs: int, batch_pairs: int) -> int:
    return -(-pairs // batch_pairs)


def plan_micro_batches(
    lengths: np.ndarray, *, token_budget: int, ranks: int, row_groups: int
) -> list[list[MicroBatchPlan]]:
    """Pack one global batch: ``plan[k][r]`` is what rank ``r`` computes in micro-step ``k``.

    Args:
        lengths: ``(P, 2)`` tokens of the chosen and rejected rows of the global batch.
        token_budget: padded tokens of one micro-batch; a pair longer than that stands alone.
        ranks: number of data-parallel ranks.
        row_groups: padded blocks per micro-batch, at most.
    """
    by_length = np.argsort(-lengths.sum(axis=1), kind="stable")
    bins = _pack(lengths, by_length, token_budget, row_groups)
    count = -(-len(bins) // ranks) * ranks
    bins = _balance(lengths, by_length, token_budget, row_groups, bins, count)
    plans = [_plan(lengths, pairs, row_groups) for pairs in bins]
    plans += [MicroBatchPlan((), (), 0)] * (count - len(plans))
    return [plans[start : start + ranks] for start in range(0, count, ranks)]


def _pack(lengths: np.ndarray, order: np.ndarray, cap: int, row_groups: int) -> list[list[int]]:
    """Next-fit over pairs in falling length: cut where the padded tokens would pass ``cap``."""
    bins: list[list[int]] = []
    rows: list[int] = []
    for pair in order.tolist():
        longer = [*rows, *lengths[pair].tolist()]
        if bins and _split_rows(np.array(longer), row_groups)[0] <= cap:
            bins[-1].append(pair)
            rows = longer
        else:
            bins.append([pair])
            rows = lengths[pair].tolist()
    return bins


def _balance(
    lengths: np.ndarray, order: np.ndarray, budget: int, row_groups: int, bins: list[list[int]], count: int
) -> list[list[int]]:
    """The packing into at most ``count`` bins with the smallest cap (to 2 %): even work for all ranks."""
    low, high = int(lengths.sum()) // max(count, 1), budget
    while high - low > max(high // 50, 1):
        middle = (low + high) // 2
        trial = _pack(lengths, order, middle, row_groups)
        if len(trial) <= count:
            bins, high = trial, middle
        else:
            low = middle
    return bins


def _plan(lengths: np.ndarray, pairs: list[int], row_groups: int) -> MicroBatchPlan:
    rows = np.concatenate([lengths[pairs, 0], lengths[pairs, 1]])
    cost, groups = _split_rows(rows, row_groups)
    return MicroBatchPlan(tuple(pairs), groups, cost)


def _split_rows(rows: np.ndarray, row_groups: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Cut rows, sorted by length, into at most ``row_groups`` blocks with the fewest padded tokens.

    Dynamic programme over cut positions: ``best[j]`` is the least cost of the ``j`` longest rows.
    """
    order = np.argsort(-rows, kind="stable")
    sizes = rows[order]
    count = len(rows)
    width = np.arange(count + 1)[None, :] - np.arange(count)[:, None]
    block = np.where(width > 0, sizes[:, None] * width, np.iinfo(np.int64).max // 4)  # rows i..j-1 padded to row i
    best = np.concatenate([[0], block[0, 1:]])
    starts = [np.zeros(count + 1, dtype=np.int64)]
    for _ in range(min(row_groups, count) - 1):
        total = best[:-1, None] + block
        starts.append(total.argmin(axis=0))
        best = np.concatenate([[0], total[:, 1:].min(axis=0)])
    cuts = [count]
    for start in reversed(starts):
        if cuts[-1] > 0:
            cuts.append(int(start[cuts[-1]]))
    cuts = cuts[::-1]
    groups = [tuple(order[a:b].tolist()) for a, b in itertools.pairwise(cuts) if b > a]
    return int(best[count]), tuple(groups)


def collate(source: PairSource, indices: Sequence[int], plan: MicroBatchPlan, group_count: int) -> PreferenceBatch:
    """Tokens of one micro-batch; padded with one-token filler groups to ``group_count`` forwards.

    Args:
        source: the pairs.
        indices: dataset indices of the global batch that ``plan`` was made for.
        plan: what to collate.
        group_count: row groups that every rank runs in this micro-step.
    """
    pairs = [source.pair(int(indices[position])) for position in plan.pairs]
    rows = [(pair.chosen, pair.chosen_response_start) for pair in pairs]
    rows += [(pair.rejected, pair.rejected_response_start) for pair in pairs]
    groups = [_row_group([rows[row] for row in group]) for group in plan.groups]
    groups += [_row_group([(np.zeros(1, dtype=np.int64), 0)])] * (group_count - len(groups))
    flat = np.array([row for group in plan.groups for row in group], dtype=np.int64)
    gaps = [(pair.chosen_score, pair.rejected_score) for pair in pairs]
    return PreferenceBatch(
        groups=tuple(groups),
        order=torch.from_numpy(np.argsort(flat)),
        positions=torch.tensor(plan.pairs, dtype=torch.long),
        row_ids=tuple(pair.row_id for pair in pairs),
        margins=_column([pair.margin for pair in pairs]),
        score_gaps=_column([None if None in gap else gap[0] - gap[1] for gap in gaps]),
    )


def groups_per_micro_step(plans: Sequence[MicroBatchPlan]) -> int:
    """Forwards that every rank runs in a micro-step: the most that any of them needs."""
    return max(1, *(len(plan.groups) for plan in plans))


def _row_group(rows: list[tuple[np.ndarray, int]]) -> RowGroup:
    lengths = torch.tensor([len(tokens) for tokens, _ in rows])
    starts = torch.tensor([start for _, start in rows])
    width = int(lengths.max())
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for place, (tokens, _) in enumerate(rows):
        padded[place, : len(tokens)] = tokens
    mask = length_mask(lengths, width)
    return RowGroup(
        tokens=torch.from_numpy(padded),
        token_mask=mask,
        response_mask=mask & ~length_mask(starts, width),
    )


def _column(values: list[float | None]) -> Tensor | None:
    return None if any(value is None for value in values) else torch.tensor(values, dtype=torch.float32)
