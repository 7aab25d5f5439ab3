"""Rows of tokens as one sequence without padding, in which tokens with the same past stand once.

A causal model computes the same for a token and its past wherever they stand. So the prompt of two answers, the system
prompt of a whole micro-batch, and everything else that rows begin alike with, needs to be computed once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlhf.core.moving import moved

BLOCK = 128
"""Tokens of a block of FlexAttention's masks."""
SMALLEST, SMALLEST_STEP = 2 * BLOCK, 16
"""Kernels are built for two blocks or more: a single one would have one of its own."""
LEAST_SHARE = 1 / 64
"""Share of the tokens of all rows. Where less would be saved, as by a first token that all have, rows stand one by one,
for kernels that know nothing of trees."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """N tokens of one sequence, and where they stand in blocks of padded rows.

    The places are those of all ``(R, T)`` blocks end to end, row by row: P of them.
    """

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, each token's in its rows, from 0
    ends: Tensor  # (N,) int64: what has the token in its past (the token itself, too) stands from it on up to here
    first: Tensor  # (N,) int64, the first place of each token
    slots: Tensor  # (P,) int64, the token of the sequence at each place; of padding, any
    repeats: Tensor  # (M,) int64, the other places of tokens that stand in several rows
    shapes: tuple[tuple[int, int], ...]  # of the blocks
    lengths: tuple[int, ...]  # of the rows in the order of the sequence, where none begins like another; else none

    def spread(self, values: Tensor) -> Tensor:
        """``(P, ...)`` from ``(N, ...)``: the value of each place's token. No gradient comes from padding."""
        return _Spread.apply(values, self)

    def collect(self, values: Tensor) -> Tensor:
        """``(N, ...)`` from ``(P, ...)``: the value at the first place of each token."""
        return collect(values, self.first)

    def blocks(self, values: Tensor) -> list[Tensor]:
        """``(R, T, ...)`` of each block, from ``(P, ...)``."""
        parts = values.split([rows * width for rows, width in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def to(self, device: torch.device) -> "Packing":
        there: dict[str, Any] = {
            field.name: moved(value, device) if isinstance(value := getattr(self, field.name), Tensor) else value
            for field in fields(self)
        }
        return Packing(**there)

    def padded(self) -> "Packing":
        """The same in one of a few lengths: tokens behind the others, each with no past but itself."""
        count = len(self.tokens)
        more = padded_length(count) - count
        own = torch.arange(count + 1, count + more + 1, device=self.ends.device)
        return replace(
            self,
            tokens=F.pad(self.tokens, (0, more)),
            positions=F.pad(self.positions, (0, more)),
            ends=torch.cat([self.ends, own]),
            lengths=(*self.lengths, *[1] * more) if self.lengths else (),
        )


def padded_length(count: int) -> int:
    """The next of the lengths that kernels are built for: 32 of them up to each doubling, 1.1 % longer on average."""
    step = max(SMALLEST_STEP, 2 ** (count.bit_length() - 6))
    return max(SMALLEST, -(-count // step) * step)


def pack(blocks: Sequence[tuple[np.ndarray, np.ndarray]]) -> Packing:
    """Lay the rows of blocks end to end, the beginnings that they share once.

    Args:
        blocks: of each the ``(R, T)`` tokens, padded on the right, and the ``(R,)`` lengths of its rows.
    """
    starts, rows = [], []
    begin = 0
    for tokens, lengths in blocks:
        starts += (begin + np.arange(len(tokens)) * tokens.shape[1]).tolist()
        rows += [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]
        begin += tokens.size
    order, common = _beginnings(rows)
    slots = np.zeros(begin, np.int64)
    first, repeats, ends = [], [], []
    count, path = 0, np.zeros(0, np.int64)  # the tokens of the last row, by their place in the sequence
    for index, alike in zip(order, common, strict=True):
        place, length = starts[index], len(rows[index])
        ends.append((path[alike:], count))
        path = np.concatenate([path[:alike], count + np.arange(length - alike)])
        slots[place : place + length] = path
        repeats.append(np.arange(place, place + alike))
        first.append(np.arange(place + alike, place + length))
        count += length - alike
    ends.append((path, count))
    places, last = np.concatenate(first), np.zeros(count, np.int64)
    for tokens_of, end in ends:
        last[tokens_of] = end
    columns = np.concatenate([np.tile(np.arange(tokens.shape[1]), len(tokens)) for tokens, _ in blocks])
    flat = np.concatenate([tokens.reshape(-1) for tokens, _ in blocks])
    return Packing(
        tokens=torch.from_numpy(flat[places]),
        positions=torch.from_numpy(columns[places]),
        ends=torch.from_numpy(last),
        first=torch.from_numpy(places),
        slots=torch.from_numpy(slots),
        repeats=torch.from_numpy(np.concatenate(repeats)),
        shapes=tuple((len(tokens), tokens.shape[1]) for tokens, _ in blocks),
        lengths=() if any(common) else tuple(len(rows[index]) for index in order),
    )


def packed_tokens(rows: Sequence[np.ndarray]) -> int:
    """How many tokens the sequence of :func:`pack` has for these rows."""
    return sum(map(len, rows)) - sum(_beginnings(rows)[1])


def _beginnings(rows: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """The rows in the order of the sequence, and how many tokens each of these begins alike with as the one before."""
    # In the order of a dictionary, a row has no longer beginning in common with any row before than with the last one.
    order = sorted(range(len(rows)), key=lambda index: rows[index].astype(">u4").tobytes())
    common = [0, *(_common(rows[left], rows[right]) for left, right in itertools.pairwise(order))]
    if sum(common) < LEAST_SHARE * sum(map(len, rows)):
        common = [0] * len(rows)
    return order, common


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """How many tokens two rows begin alike with."""
    shorter = min(len(left), len(right))
    differing = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differing[0]) if len(differing) else shorter


def collect(values: Tensor, places: Tensor) -> Tensor:
    """``(n, ...)``: the rows ``places``, all different, of ``values``."""
    return _Collect.apply(values, places)


class _Spread(torch.autograd.Function):
    """Written out, as the gradient of an index adds place after place; here all but the shared tokens are copied."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return values.index_select(0, packing.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        packing: Packing = ctx.packing
        gradient = upstream.index_select(0, packing.first)
        if len(packing.repeats):
            slots = packing.slots.index_select(0, packing.repeats)
            gradient.index_add_(0, slots, upstream.index_select(0, packing.repeats))
        return gradient, None


class _Collect(torch.autograd.Function):
    """Written out: every token has one first place, so that nothing needs to be added."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, first: Tensor) -> Tensor:
        ctx.first, ctx.places = first, len(values)
        return values.index_select(0, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        gradient = upstream.new_zeros(ctx.places, *upstream.shape[1:])
        return gradient.index_copy_(0, ctx.first, upstream), None
