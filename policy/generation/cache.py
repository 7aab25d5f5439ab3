"""Keys and values of the rows being written, in buffers that grow by blocks of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

BLOCK = 64
"""Tokens by which buffers grow: one copy of what is there for so many tokens."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values as views of larger buffers.

    ``DynamicLayer`` copies everything it has for each token; this one writes the new token into its place, and copies
    when a block is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        rows, begin = key_states.shape[0], self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, new in zip(self._with_room_for(end), (key_states, value_states), strict=True):
            buffer[:rows, :, begin:end] = new
        return self._show(rows, end)

    def expand(self, source: Tensor) -> None:
        """Row k becomes a copy of row ``source[k]``."""
        self.keys, self.values = (held.index_select(0, source) for held in self._held())
        self._buffers = None

    def shrink(self, rows: int, moves: tuple[Tensor, Tensor]) -> None:
        """Keep the first ``rows`` rows, after rows ``moves[1]`` have taken the places ``moves[0]``."""
        length = self.get_seq_length()
        to, origin = moves
        for buffer in self._with_room_for(length):
            buffer[to, :, :length] = buffer[origin, :, :length]
        self._show(rows, length)

    def align(self, others: Sequence["RoomyLayer"], columns: int) -> None:
        """Take the rows of ``others`` in, so that all end in the last of ``columns`` columns."""
        parts = zip(self._held(), *(other._held() for other in others), strict=True)
        buffers = [_side_by_side(each, columns, room=BLOCK) for each in parts]
        self._buffers = buffers[0], buffers[1]
        self._show(len(buffers[0]), columns)

    def _show(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:rows, :, :length] for buffer in self._with_room_for(length))
        self.keys, self.values = keys, values
        return keys, values

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "the prompts come first"
        return self.keys, self.values

    def _with_room_for(self, length: int) -> tuple[Tensor, Tensor]:
        if self._buffers is None or self._buffers[0].shape[2] < length:
            keys, values = ((held,) for held in self._held())
            there = self.get_seq_length()
            room = max(BLOCK, length - there)
            self._buffers = _side_by_side(keys, there, room=room), _side_by_side(values, there, room=room)
        return self._buffers


def _side_by_side(parts: Sequence[Tensor], columns: int, *, room: int = 0) -> Tensor:
    """``(B, H, columns + room, D)``: the rows of all parts, each ``(b, H, c, D)``, ending in the last of the columns.

    What a part lacks is 0, and what it has beyond them is left out. The room is not written to.
    """
    first = parts[0]
    found = first.new_empty((sum(map(len, parts)), first.shape[1], columns + room, first.shape[3]))
    begin = 0
    for part in parts:
        rows, taken = found[begin : begin + len(part)], min(columns, part.shape[2])
        rows[:, :, : columns - taken] = 0  # a place that is masked must hold a number
        rows[:, :, columns - taken : columns] = part[:, :, part.shape[2] - taken :]
        begin += len(part)
    return found


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache for the layers of a model.

    Args:
        config: of the model. Its layers with full attention become :class:`RoomyLayer`; others (sliding windows,
            linear attention) stay what Transformers makes them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def expand(cache: Cache, source: Tensor) -> None:
    """Row k of the cache becomes a copy of row ``source[k]``."""
    for layer in cache.layers:
        layer.expand(source) if isinstance(layer, RoomyLayer) else _reorder(layer, source)


def shrink(cache: Cache, source: Sequence[int], device: torch.device) -> None:
    """Row k of the cache becomes row ``source[k]``; there are no more rows than before.

    Only rows whose place changes are copied, so let ``source[k]`` be k where it can.
    """
    moved = [(to, origin) for to, origin in enumerate(source) if to != origin]
    to, origin = torch.tensor(moved, dtype=torch.long).view(-1, 2).unbind(dim=1)
    moves = to.to(device), origin.to(device)
    everything = torch.tensor(source, device=device)
    for layer in cache.layers:
        layer.shrink(len(source), moves) if isinstance(layer, RoomyLayer) else _reorder(layer, everything)


def takes_more_rows(cache: Cache) -> bool:
    """Whether :func:`align` knows all layers of a cache: those with a column for each token, or for the last ones."""
    return bool(cache.layers) and all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def align(cache: Cache, others: Sequence[Cache], columns: int) -> None:
    """Let all rows of ``cache``, and of ``others`` behind them, end in the last of ``columns`` columns.

    Args:
        cache, others: of one model, with prompts in them. ``others`` are emptied, layer by layer.
        columns: as many as the longest row has tokens.
    """
    layers: list[list[Any]] = [each.layers for each in (cache, *others)]
    for layer, *more in zip(*layers, strict=True):
        layer.align(more, columns) if isinstance(layer, RoomyLayer) else _align_window(layer, more, columns)
        for each in more:
            each.keys = each.values = None


def _align_window(layer: Any, others: Sequence[Any], columns: int) -> None:
    """The same for a layer that keeps the columns of its window alone, all but one."""
    width = min(columns, layer.sliding_window - 1)
    layer.keys = _side_by_side([layer.keys, *(other.keys for other in others)], width)
    layer.values = _side_by_side([layer.values, *(other.values for other in others)], width)
    layer.cumulative_length = columns


def _reorder(layer: Any, source: Tensor) -> None:
    """Transformers' own way, for any of its kinds of layers."""
    layer.reorder_cache(source)
