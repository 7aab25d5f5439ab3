"""Global batches of an exact number of items, packed into micro-batches under a token budget.

A step is one global batch of items: pairs of rows, or single rows. They are sorted by length and cut into
micro-batches whose padded tokens stay under the budget; each micro-batch is computed as a few length buckets,
each padded to its own longest row, so that the short answer of a pair does not pay for the long one. Every
rank makes the same plan from the same lengths, so no communication is needed and all ranks run the same
number of forwards.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.core.epochs import LastBatch, steps_per_epoch
from rlhf.core.masking import length_mask
from rlhf.core.moving import moved
from rlhf.core.packing import Packing, pack

PADDING_SLACK = 1.04
"""Padded tokens that a split into fewer length buckets may take, relative to those of the best split."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text as tokens."""

    tokens: np.ndarray  # (T,) integers
    response: np.ndarray  # (T,) bool, True on the tokens that a model is to write


@dataclass(frozen=True, slots=True)
class Item:
    """What is never cut apart: the two rows of a pair, or of an answer and its mismatch, or one conversation."""

    row_id: str
    rows: tuple[Row, ...]
    margin: float | None = None
    label: bool | None = None


class ItemSource(Protocol):
    """Where items come from: a ``PreferenceDataset``, or an ``ExampleDataset``."""

    @property
    def lengths(self) -> np.ndarray:
        """``(N, S)`` tokens of the S rows of every item."""

    @property
    def fingerprint(self) -> str:
        """A name for the contents: equal items in equal order have equal names."""

    def __len__(self) -> int: ...

    def item(self, index: int) -> Item: ...


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """Which items a rank computes together, and in which length buckets.

    ``items`` are B positions in the global batch. Row ``k`` of ``buckets`` is row ``k // B`` of item
    ``items[k % B]``: of pairs, first all chosen rows, then all rejected ones. A plan without items is
    filler: it keeps a rank in step and weighs nothing.
    """

    items: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]
    padded_tokens: int


@dataclass(frozen=True, kw_only=True)
class LengthBucket:
    """Rows of one padded block."""

    tokens: Tensor  # (R, T) int64, right-padded
    token_mask: Tensor  # (R, T) bool, True on real tokens
    response_mask: Tensor  # (R, T) bool, True on response tokens, the end token included
    response_places: Tensor | None = None
    """``(n,)`` int64, where ``response_mask[:, 1:]`` is True, row by row; ``None``: see :meth:`places`."""
    longest_response: int | None = None
    """Most of them in a row; ``None``: see :meth:`longest`."""

    def places(self) -> Tensor:
        """Where tokens are that a response's token follows. A GPU is waited for if it is not known."""
        known = self.response_places
        return self.response_mask[:, 1:].flatten().nonzero().squeeze(1) if known is None else known

    def longest(self) -> int:
        """The most response tokens of a row, the first place apart. A GPU is waited for if it is not known."""
        known = self.longest_response
        return int(self.response_mask[:, 1:].sum(dim=1).max()) if known is None else known

    def to(self, device: torch.device) -> "LengthBucket":
        places = self.response_places
        return LengthBucket(
            tokens=moved(self.tokens, device),
            token_mask=moved(self.token_mask, device),
            response_mask=moved(self.response_mask, device),
            response_places=None if places is None else moved(places, device),
            longest_response=self.longest_response,
        )


@dataclass(frozen=True, kw_only=True)
class Buckets(Sequence[LengthBucket]):
    """The length buckets of a micro-batch, and the same rows as one packed sequence."""

    blocks: tuple[LengthBucket, ...]
    packing: Packing | None
    """``None`` where nothing may be packed; the model then computes one bucket after the other."""

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: Any) -> Any:
        return self.blocks[place]

    def to(self, device: torch.device) -> "Buckets":
        packing = None if self.packing is None else self.packing.to(device)
        return Buckets(blocks=tuple(block.to(device) for block in self.blocks), packing=packing)


def token_blocks(buckets: Sequence[LengthBucket]) -> tuple[list[Tensor], Packing | None]:
    """What :func:`rlhf.models.hidden_states.last_states` takes: the tokens of each bucket, and how they are packed."""
    return [bucket.tokens for bucket in buckets], getattr(buckets, "packing", None)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B items of S rows each, spread over length buckets.

    ``order`` puts the rows back: indexing the concatenated outputs of all buckets by it gives the first
    rows of all items, then their second rows: B chosen rows, then the B rejected rows of the same
    prompts. Filler has ``B = 0``.
    """

    buckets: Buckets
    rows_per_item: int  # S
    order: Tensor  # (S * B,) int64
    positions: Tensor  # (B,) int64, places of the items in the global batch
    indices: Tensor  # (B,) int64, places of the items in the dataset
    host_indices: np.ndarray  # the same, where the host can read them
    row_ids: tuple[str, ...]
    margins: Tensor | None  # (B,) float32, the data's own margins, NaN where an item has none
    labels: Tensor | None  # (B,) bool, whether the response is a desirable one
    parts: tuple["Batch", ...] = ()
    """The first rows of all items by themselves, then their second rows: S batches of one row an item. They have as
    many length buckets, of which some may be filler. If asked for."""

    def __len__(self) -> int:
        return len(self.row_ids)

    def sides(self, values: Tensor) -> tuple[Tensor, ...]:
        """Outputs of all buckets, one by row, as S tensors of B: for pairs, of chosen and of rejected."""
        return values[self.order].view(self.rows_per_item, len(self), *values.shape[1:]).unbind()

    def to(self, device: torch.device) -> "Batch":
        there: dict[str, Any] = {
            field.name: moved(value, device) if isinstance(value, Tensor) else value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | Buckets)
        }
        return replace(self, **there, parts=tuple(part.to(device) for part in self.parts))


def global_batch(step: int, *, items: int, batch_size: int, seed: int, last: LastBatch = "keep") -> np.ndarray:
    """Dataset indices of the global batch of ``step`` (counted from 0 over all epochs).

    Every epoch is a new seeded order of all items; ``last`` says what its last batch is. The position in
    the data is the step number alone, so resuming needs no other state.
    """
    steps = steps_per_epoch(items, batch_size, last)
    epoch, place = divmod(step, steps)
    order = np.random.default_rng((seed, epoch)).permutation(items)
    takes_the_rest = place + 1 == steps and last != "drop"
    return order[place * batch_size : None if takes_the_rest else (place + 1) * batch_size]


def plan_micro_batches(
    lengths: np.ndarray, *, token_budget: int, ranks: int, length_buckets: int
) -> list[list[MicroBatchPlan]]:
    """Pack one global batch: ``plan[k][r]`` is what rank ``r`` computes in micro-step ``k``.

    Args:
        lengths: ``(P, S)`` tokens of the rows of each item of the global batch.
        token_budget: padded tokens of one micro-batch; an item longer than that stands alone.
        ranks: number of data-parallel ranks.
        length_buckets: padded blocks per micro-batch, at most.
    """
    values = np.ascontiguousarray(lengths, dtype=np.int64)
    planned = _planned(values.tobytes(), values.shape, token_budget, ranks, length_buckets)
    return [list(micro_step) for micro_step in planned]


@functools.lru_cache(maxsize=64)
def _planned(
    content: bytes, shape: tuple[int, int], token_budget: int, ranks: int, length_buckets: int
) -> list[list[MicroBatchPlan]]:
    """The same rows are asked for again and again: by each model that scores the rollouts of a PPO step, by each epoch
    of its update, by every evaluation."""
    lengths = np.frombuffer(content, np.int64).reshape(shape)
    by_length = np.argsort(-lengths.sum(axis=1), kind="stable")
    bins = _pack(lengths, by_length, token_budget, length_buckets)
    count = -(-len(bins) // ranks) * ranks
    bins = _balance(lengths, by_length, token_budget, length_buckets, bins, count)
    plans = [_plan(lengths, items, token_budget, length_buckets) for items in bins]
    plans += [MicroBatchPlan((), (), 0)] * (count - len(plans))
    return [plans[start : start + ranks] for start in range(0, count, ranks)]


def _pack(lengths: np.ndarray, order: np.ndarray, cap: int, length_buckets: int) -> list[list[int]]:
    """Next-fit over items in falling length: cut where the padded tokens would pass ``cap``.

    More rows never take fewer tokens, so where to cut is found by bisection, from as many items as would fit without
    padding: that is nearly where the cut is.
    """
    ordered = lengths[order]
    ends = np.concatenate([[0], ordered.sum(axis=1).cumsum()])
    bins: list[list[int]] = []
    start = 0
    while start < len(order):
        fits = start + 1  # an item that is longer than the cap stands alone
        fails = max(fits, int(np.searchsorted(ends, ends[start] + cap, side="right")) - 1) + 1
        step = 1
        while fails - fits > 1:
            middle = max(fails - step, (fits + fails) // 2)
            if _least_tokens(ordered[start:middle].reshape(-1), length_buckets) <= cap:
                fits = middle
            else:
                fails, step = middle, 2 * step
        bins.append(order[start:fits].tolist())
        start = fits
    return bins


def _balance(
    lengths: np.ndarray, order: np.ndarray, budget: int, length_buckets: int, bins: list[list[int]], count: int
) -> list[list[int]]:
    """The packing into at most ``count`` bins with the smallest cap (to 2 %): even work for all ranks."""
    low, high = int(lengths.sum()) // max(count, 1), budget
    while high - low > max(high // 50, 1):
        middle = (low + high) // 2
        trial = _pack(lengths, order, middle, length_buckets)
        if len(trial) <= count:
            bins, high = trial, middle
        else:
            low = middle
    return bins


def _plan(lengths: np.ndarray, items: list[int], budget: int, length_buckets: int) -> MicroBatchPlan:
    """One micro-batch in as few length buckets as come near the least padding: every bucket is a forward of its own."""
    rows = lengths[items].T.reshape(-1)
    least = _least_tokens(rows, length_buckets)
    bound = max(least, min(PADDING_SLACK * least, budget))
    enough = next(count for count in range(1, length_buckets + 1) if _least_tokens(rows, count) <= bound)
    cost, buckets = _split_rows(rows, enough)
    return MicroBatchPlan(tuple(items), buckets, cost)


def _least_tokens(rows: np.ndarray, length_buckets: int) -> int:
    """The padded tokens of :func:`_split_rows`: rows of one length stay together in one of the best splits, so that
    only the distinct lengths count."""
    sizes, counts = np.unique(rows, return_counts=True)
    sizes, counts = sizes[::-1], counts[::-1]
    ends = np.concatenate([[0], counts.cumsum()])
    block = np.where(ends > ends[:-1, None], sizes[:, None] * (ends - ends[:-1, None]), np.iinfo(np.int64).max // 4)
    best = np.concatenate([[0], block[0, 1:]])
    for _ in range(min(length_buckets, len(sizes)) - 1):
        best = np.concatenate([[0], (best[:-1, None] + block)[:, 1:].min(axis=0)])
    return int(best[-1])


def _split_rows(rows: np.ndarray, length_buckets: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Cut rows, sorted by length, into at most ``length_buckets`` blocks with the fewest padded tokens.

    The best blocks are contiguous in sorted order, so a dynamic program over cut positions is exact; it takes
    O(length_buckets R^2), as array operations.

    Args:
        rows: ``(R,)`` tokens of the rows.
        length_buckets: blocks, at most.
    Returns:
        The padded tokens of all blocks, and the rows of each block, longest first.
    """
    order = np.argsort(-rows, kind="stable")
    sizes = rows[order]
    count = len(rows)
    # block[i, j] is the cost of rows i..j-1 in one block, padded to its longest, row i. Impossible blocks (j <= i) cost
    # a quarter of the largest integer: more than any batch has tokens, and sums of two of them do not overflow.
    width = np.arange(count + 1)[None, :] - np.arange(count)[:, None]
    block = np.where(width > 0, sizes[:, None] * width, np.iinfo(np.int64).max // 4)
    # best[j] is the least cost of the j longest rows in as many blocks as rounds so far; starts[k][j], where the last
    # of those blocks begins. The first round knows one block, so it begins at row 0.
    best = np.concatenate([[0], block[0, 1:]])
    starts = [np.zeros(count + 1, dtype=np.int64)]
    for _ in range(min(length_buckets, count) - 1):
        total = best[:-1, None] + block
        starts.append(total.argmin(axis=0))
        best = np.concatenate([[0], total[:, 1:].min(axis=0)])
    # Backwards from the last cut. An optimum may need fewer blocks than allowed: then cuts repeat, and are dropped.
    cuts = [count]
    for start in reversed(starts):
        if cuts[-1] > 0:
            cuts.append(int(start[cuts[-1]]))
    cuts = cuts[::-1]
    buckets = [tuple(order[a:b].tolist()) for a, b in itertools.pairwise(cuts) if b > a]
    return int(best[count]), tuple(buckets)


def collate(
    source: ItemSource,
    indices: np.ndarray,
    plan: MicroBatchPlan,
    bucket_count: int,
    *,
    packed: bool = False,
    apart: bool = False,
) -> Batch:
    """Tokens of one micro-batch; padded with one-token filler buckets to ``bucket_count`` forwards.

    Args:
        source: the items.
        indices: dataset indices of the global batch that ``plan`` was made for.
        plan: what to collate.
        bucket_count: length buckets that every rank runs in this micro-step.
        packed: whether to lay the rows out as one sequence, too, for models that take it.
        apart: whether to make the batches of each side of the items, too.
    """
    chosen = np.asarray(indices)[list(plan.items)].astype(np.int64)
    items = [source.item(int(index)) for index in chosen]
    rows = [row for side in zip(*(item.rows for item in items), strict=True) for row in side]
    batch = Batch(
        buckets=Buckets(blocks=(), packing=None),
        rows_per_item=source.lengths.shape[1],
        order=torch.zeros(0, dtype=torch.long),
        positions=torch.tensor(plan.items, dtype=torch.long),
        indices=torch.from_numpy(chosen),
        host_indices=chosen,
        row_ids=tuple(item.row_id for item in items),
        margins=_column([item.margin for item in items], torch.float32),
        labels=_column([item.label for item in items], torch.bool),
    )
    groups = [*plan.buckets, *[()] * (bucket_count - len(plan.buckets))]
    sides = [_of_side(groups, side, len(items)) for side in range(batch.rows_per_item)] if apart else []
    parts = (replace(batch, rows_per_item=1, **_laid_out(rows, groups, packed)) for groups in sides)
    return replace(batch, **_laid_out(rows, groups, packed), parts=tuple(parts))


def _of_side(groups: Sequence[tuple[int, ...]], side: int, count: int) -> list[tuple[int, ...]]:
    """The rows of one side of ``count`` items, of each bucket."""
    return [tuple(row for row in group if row // count == side) for group in groups] if count else [*groups]


def _laid_out(rows: Sequence[Row], groups: Sequence[tuple[int, ...]], packed: bool) -> dict[str, Any]:
    """``buckets`` and ``order`` of a batch whose buckets hold the rows ``groups``; an empty one is filler."""
    buckets = [length_bucket([rows[row] for row in group] or [FILLER]) for group in groups]
    places = np.cumsum([0, *(max(1, len(group)) for group in groups)])
    row_of = np.array([row for group in groups for row in group], dtype=np.int64)
    place_of = [place + np.arange(len(group)) for place, group in zip(places, groups, strict=False)]
    order = np.concatenate(place_of)[np.argsort(row_of)].astype(np.int64)
    laid_out = packed_buckets(buckets) if packed else Buckets(blocks=tuple(buckets), packing=None)
    return {"buckets": laid_out, "order": torch.from_numpy(order)}


def packed_buckets(buckets: Sequence[LengthBucket]) -> Buckets:
    """Buckets with their rows packed."""
    return Buckets(blocks=tuple(buckets), packing=_packing(buckets))


def _packing(buckets: Sequence[LengthBucket]) -> Packing:
    return pack([(bucket.tokens.cpu().numpy(), bucket.token_mask.sum(dim=1).cpu().numpy()) for bucket in buckets])


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of rows that are asked about together: rows of like length, the longest first.

    Args:
        lengths: tokens of each row.
        batch_tokens: padded tokens of a batch, at most; a longer row stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def buckets_per_micro_step(plans: Sequence[MicroBatchPlan]) -> int:
    """Forwards that every rank runs in a micro-step: the most that any of them needs."""
    return max(1, *(len(plan.buckets) for plan in plans))


def length_bucket(rows: Sequence[Row]) -> LengthBucket:
    """Rows padded on the right to the longest of them."""
    lengths = torch.tensor([len(row.tokens) for row in rows])
    width = int(lengths.max())
    padded = np.zeros((len(rows), width), dtype=np.int64)
    response = np.zeros((len(rows), width), dtype=bool)
    for place, row in enumerate(rows):
        padded[place, : len(row.tokens)] = row.tokens
        response[place, : len(row.tokens)] = row.response
    return LengthBucket(
        tokens=torch.from_numpy(padded),
        token_mask=length_mask(lengths, width),
        response_mask=torch.from_numpy(response),
        response_places=torch.from_numpy(np.flatnonzero(response[:, 1:])),
        longest_response=int(response[:, 1:].sum(axis=1).max()),
    )


FILLER = Row(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool))
"""One token that weighs nothing. It is no response, so no vocabulary projection is made for it."""


def _column(values: list[Any], dtype: torch.dtype) -> Tensor | None:
    """One value an item, NaN where it has none; ``None`` where no item has one."""
    if all(value is None for value in values):
        return None
    return torch.tensor([math.nan if value is None else value for value in values], dtype=dtype)
