"""Rows that begin alike, as one row: the common beginning is computed once, and no row sees what is another's own.

The two answers of a pair share their prompt. In place of two rows

    P P P A A        the packed row is   P P P A A B B B
    P P P B B B      with positions      0 1 2 3 4 3 4 5

where a token of A sees P and what stands before it in A, and a token of B sees P and what stands before it in B. A
causal model gives each token the same state either way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COMMON = 0
PADDING = -1


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """K packed rows, made of R rows of up to T tokens."""

    tokens: Tensor
    """``(K, L)`` int64, padded on the right."""
    positions: Tensor
    """``(K, L)`` int64 places of the tokens in their own rows."""
    segments: Tensor
    """``(K, L)`` int64: :data:`COMMON`, s + 1 for the rest of the s-th row of those packed together, or
    :data:`PADDING`."""
    places: Tensor
    """``(R, T)`` int64: where in the flattened ``(K * L,)`` the state of each token stands; behind a row, anywhere."""

    def visible(self) -> Tensor:
        """``(K, 1, L, L)`` bool: which tokens each token sees. Padding sees itself alone."""
        own, seen = self.segments[:, :, None], self.segments[:, None, :]
        count = self.segments.shape[1]
        earlier = torch.ones(count, count, dtype=torch.bool, device=own.device).tril()
        itself = torch.eye(count, dtype=torch.bool, device=own.device)
        return (((seen == own) | (seen == COMMON)) & (own != PADDING) & earlier | itself)[:, None]

    def unpacked(self, states: Tensor) -> Tensor:
        """``(R, T, D)`` states of the rows, from ``(K, L, D)`` of the packed ones."""
        return states.flatten(0, 1).index_select(0, self.places.flatten()).view(*self.places.shape, -1)

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(**{each.name: getattr(self, each.name).to(device) for each in fields(self)})


def common_prefix(rows: Sequence[NDArray[np.integer]]) -> int:
    """How many tokens all rows begin with."""
    first, *others = rows
    count = len(first)
    for other in others:
        count = min(count, len(other))
        differs = first[:count] != other[:count]
        if differs.any():
            count = int(differs.argmax())
    return count


def packed_length(rows: Sequence[NDArray[np.integer]]) -> int:
    """Tokens of the packed row of ``rows``."""
    return sum(map(len, rows)) - (len(rows) - 1) * common_prefix(rows)


def pack(items: Sequence[Sequence[NDArray[np.integer]]]) -> PackedRows:
    """One packed row for each item: the rows of an item are packed together, and come back one after the other.

    Args:
        items: K of them, each of as many ``(T,)`` rows of tokens.
    """
    width = max(map(packed_length, items))
    longest = max(len(row) for rows in items for row in rows)
    shape = (len(items), width)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, PADDING, np.int64)
    places = np.zeros((sum(map(len, items)), longest), np.int64)
    row_number = 0
    for item, rows in enumerate(items):
        common = end = common_prefix(rows)
        tokens[item, :common], positions[item, :common], segments[item, :common] = (
            rows[0][:common],
            np.arange(common),
            0,
        )
        for number, row in enumerate(rows):
            own = slice(end, end + len(row) - common)
            tokens[item, own], segments[item, own] = row[common:], number + 1
            positions[item, own] = np.arange(common, len(row))
            start = item * width
            places[row_number, :common] = start + np.arange(common)
            places[row_number, common : len(row)] = start + np.arange(own.start, own.stop)
            end, row_number = own.stop, row_number + 1
    arrays = {"tokens": tokens, "positions": positions, "segments": segments, "places": places}
    return PackedRows(**{name: torch.from_numpy(values) for name, values in arrays.items()})
