"""The rows that are being written, and all that was written."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from policy.generation import cache as caches
from policy.generation.api import Response
from policy.generation.draw import Drawn
from policy.generation.repetition import RepetitionPenalty
from policy.generation.stopping import StopRule
from rlhf.core.moving import moved

OF_EACH_ROW = ("index", "tokens", "_uniforms", "_positions", "_counts")
"""Tensors of LiveRows with one row for each."""


class LiveRows:
    """B >= 1 rows whose tokens are in a cache, all but the last one of each. All end in the last of its columns.

    Args:
        places: ``(B,)`` of the rows among all that are asked for.
        lengths: ``(B,)`` tokens of each in the cache.
        uniforms: ``(B, max_new_tokens)`` float64 that their tokens are drawn by.
        cache: with their prompts.
        penalty: of repetitions, of these rows; ``None`` for none.
        columns: of the cache.
    """

    def __init__(
        self,
        places: NDArray[np.int64],
        lengths: NDArray[np.int64],
        uniforms: Tensor,
        cache: Cache,
        penalty: RepetitionPenalty | None,
        columns: int,
    ) -> None:
        device = uniforms.device
        self.places, self.lengths, self.columns = places, lengths, columns
        self.cache, self.penalty = cache, penalty
        self.index = torch.from_numpy(places).to(device)
        self.tokens = torch.zeros_like(self.index)
        """``(B,)`` the last ones, which are not in the cache yet."""
        self._uniforms = uniforms
        self._positions = torch.from_numpy(lengths).to(device)
        self._counts = torch.zeros_like(self.index)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def positions(self) -> Tensor:
        """``(B,)`` places of the last tokens in their rows."""
        return self._positions

    @property
    def counts(self) -> Tensor:
        """``(B,)`` tokens that each row has written so far."""
        return self._counts

    def uniforms(self) -> Tensor:
        """``(B,)`` numbers that the next tokens are drawn by."""
        return self._uniforms.gather(1, self._counts[:, None]).squeeze(1)

    def mask(self) -> Tensor | None:
        """``(B, columns + 1)`` bool, True on the tokens of each row, its last one included; ``None`` if all are."""
        if (self.lengths == self.columns).all():
            return None
        columns = torch.arange(self.columns + 1, device=self.index.device)
        return columns >= self.columns - self._positions[:, None]

    def write(self, tokens: Tensor) -> None:
        """Each row has written one of ``(B,)`` tokens."""
        self.tokens, self._counts = tokens, self._counts + 1
        if self.penalty is not None:
            self.penalty.add(tokens)

    def advance(self) -> None:
        """The last tokens are in the cache."""
        self.lengths, self._positions, self.columns = self.lengths + 1, self._positions + 1, self.columns + 1

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Only these rows go on; most keep their place, the last ones fill the gaps."""
        if len(rows) == len(self):
            return
        source = _closed_up(rows)
        caches.settle(self.cache, len(self), self.columns)
        caches.shrink(self.cache, source, self.index.device)
        index = moved(torch.tensor(source, dtype=torch.long), self.index.device)
        self.places, self.lengths = self.places[source], self.lengths[source]
        for name in OF_EACH_ROW:
            setattr(self, name, getattr(self, name)[index])
        if self.penalty is not None:
            self.penalty.keep(index)
        self._leave_out_columns()

    def join(self, other: "LiveRows") -> None:
        """Take other rows in, whose cache is emptied."""
        caches.settle(self.cache, len(self), self.columns)
        self.columns = int(max(self.lengths.max(), other.lengths.max()))
        caches.align(self.cache, [other.cache], self.columns)
        self.places = np.concatenate([self.places, other.places])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        for name in OF_EACH_ROW:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        if self.penalty is not None and other.penalty is not None:
            self.penalty.join(other.penalty)

    def _leave_out_columns(self) -> None:
        """Those of rows that have ended: the cache is never a block longer than its longest row."""
        longest = int(self.lengths.max())
        if self.columns - longest >= caches.BLOCK and caches.takes_more_rows(self.cache):
            self.columns = longest
            caches.align(self.cache, [], longest)


def _closed_up(going_on: NDArray[np.int64]) -> list[int]:
    """The rows in ``going_on`` in an order in which most keep their place: the last ones fill the gaps."""
    count = len(going_on)
    source = np.arange(count)
    gaps = np.setdiff1d(source, going_on)
    source[gaps] = going_on[going_on >= count]
    return source.tolist()


class Written:
    """What N rows have written so far.

    Args:
        rows: N.
        limit: tokens after which a row is cut.
        device: that tokens are drawn on.
    """

    def __init__(self, rows: int, limit: int, device: torch.device) -> None:
        self._limit = limit
        self._tokens, self._counts = np.zeros((rows, limit), np.int64), np.zeros(rows, np.int64)
        self._ended, self._done = np.zeros(rows, bool), np.zeros(rows, bool)
        self._logprobs, self._entropies = torch.zeros((2, rows, limit), device=device)

    @property
    def count(self) -> int:
        """Rows that are done."""
        return int(self._done.sum())

    def is_done(self, place: int) -> bool:
        return bool(self._done[place])

    def add(self, rows: LiveRows, drawn: Drawn, stop: StopRule) -> NDArray[np.int64]:
        """Append a token to each of ``rows``; which of them go on after it."""
        places = rows.places
        self._tokens[places, self._counts[places]] = drawn.tokens.cpu().numpy()
        self._logprobs[rows.index, rows.counts] = drawn.logprobs
        self._entropies[rows.index, rows.counts] = drawn.entropies
        self._counts[places] += 1
        rows.write(drawn.tokens)
        ended = stop.ends([self._tokens[place, : self._counts[place]] for place in places])
        self._ended[places] = ended
        self._done[places] = ended | (self._counts[places] == self._limit)
        return np.flatnonzero(~self._done[places])

    def forget(self, places: Sequence[int]) -> None:
        """These rows begin anew."""
        self._counts[list(places)] = 0

    def responses(self) -> list[Response]:
        """What all rows have written, in their order."""
        logprobs, entropies = self._logprobs.cpu().numpy(), self._entropies.cpu().numpy()
        return [
            Response(
                tokens=self._tokens[row, :count].copy(),
                logprobs=logprobs[row, :count].copy(),
                entropies=entropies[row, :count].copy(),
                ended=bool(self._ended[row]),
            )
            for row, count in enumerate(self._counts)
        ]
