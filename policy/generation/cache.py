"""Keys and values of the rows being written, in buffers that grow by blocks of tokens."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf.core.moving import moved

BLOCK = 64
"""Tokens by which buffers grow: one copy of what is there for so many tokens."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values as views of larger buffers.

    ``DynamicLayer`` copies everything it has for each token; this one writes the new token into its place, and copies
    when a block is full.

    Attributes:
        buffers: ``(R, H, C, D)`` each, with room for more rows and columns; ``None`` before the first token.
        end: ``(1,)`` the column of the next token, where forwards are recorded (:func:`as_buffers`); else ``None``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.end: Tensor | None = None
        self._reserved = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.end is not None:
            assert self.buffers is not None
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.end, new)
            return self.buffers
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        rows, begin = key_states.shape[0], self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, new in zip(self._with_room_for(end), (key_states, value_states), strict=True):
            buffer[:rows, :, begin:end] = new
        return self.show(rows, end)

    def reserve(self, rows: int, columns: int) -> None:
        """Take buffers of so many rows and columns, with a number in each place; they stay while they suffice."""
        held = self._held()
        made = [each.new_zeros((rows, each.shape[1], columns, each.shape[3])) for each in held]
        for buffer, each in zip(made, held, strict=True):
            buffer[: len(each), :, : each.shape[2]] = each
        self.buffers, self._reserved = (made[0], made[1]), True
        self.show(len(held[0]), held[0].shape[2])

    def expand(self, source: Tensor) -> None:
        """Row k becomes a copy of row ``source[k]``."""
        self.keys, self.values = (held.index_select(0, source) for held in self._held())
        self.buffers, self._reserved = None, False

    def shrink(self, rows: int, moves: tuple[Tensor, Tensor]) -> None:
        """Keep the first ``rows`` rows, after rows ``moves[1]`` have taken the places ``moves[0]``."""
        length = self.get_seq_length()
        to, origin = moves
        for buffer in self._with_room_for(length):
            buffer[to, :, :length] = buffer[origin, :, :length]
        self.show(rows, length)

    def align(self, others: Sequence["RoomyLayer"], columns: int) -> None:
        """Take the rows of ``others`` in, so that all end in the last of ``columns`` columns."""
        parts = list(zip(self._held(), *(other._held() for other in others), strict=True))
        rows = sum(map(len, parts[0]))
        if self._reserved and self.buffers is not None and _has_room(self.buffers[0], rows, columns):
            for buffer, (mine, *more) in zip(self.buffers, parts, strict=True):
                _lay_side_by_side(buffer, (mine.clone(), *more), columns)
        else:
            buffers = [_side_by_side(each, columns, room=BLOCK) for each in parts]
            self.buffers, self._reserved = (buffers[0], buffers[1]), False
        self.show(rows, columns)

    def show(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Let the first rows and columns be those that are there."""
        keys, values = (buffer[:rows, :, :length] for buffer in self._with_room_for(length))
        self.keys, self.values = keys, values
        return keys, values

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "the prompts come first"
        return self.keys, self.values

    def _with_room_for(self, length: int) -> tuple[Tensor, Tensor]:
        if self.buffers is None or self.buffers[0].shape[2] < length:
            keys, values = ((held,) for held in self._held())
            there = self.get_seq_length()
            room = max(BLOCK, length - there)
            self.buffers = _side_by_side(keys, there, room=room), _side_by_side(values, there, room=room)
            self._reserved = False
        return self.buffers


def _has_room(buffer: Tensor, rows: int, columns: int) -> bool:
    return len(buffer) >= rows and buffer.shape[2] >= columns


def _side_by_side(parts: Sequence[Tensor], columns: int, *, room: int = 0) -> Tensor:
    """``(B, H, columns + room, D)``: the rows of all parts, each ``(b, H, c, D)``, ending in the last of the columns.

    What a part lacks is 0, and what it has beyond them is left out. The room is not written to.
    """
    first = parts[0]
    found = first.new_empty((sum(map(len, parts)), first.shape[1], columns + room, first.shape[3]))
    _lay_side_by_side(found, parts, columns)
    return found


def _lay_side_by_side(found: Tensor, parts: Sequence[Tensor], columns: int) -> None:
    begin = 0
    for part in parts:
        rows, taken = found[begin : begin + len(part)], min(columns, part.shape[2])
        rows[:, :, : columns - taken] = 0  # a place that is masked must hold a number
        rows[:, :, columns - taken : columns] = part[:, :, part.shape[2] - taken :]
        begin += len(part)


def new_cache(config: PretrainedConfig, *, all_columns: bool = False) -> Cache:
    """An empty cache for the layers of a model.

    Args:
        config: of the model. Its layers with full attention become :class:`RoomyLayer`; others (sliding windows,
            linear attention) stay what Transformers makes them.
        all_columns: whether layers with a sliding window become so, too, and keep what has left it.
    """
    cache = DynamicCache(config=config)
    roomy = (DynamicLayer, DynamicSlidingWindowLayer) if all_columns else (DynamicLayer,)
    cache.layers = [RoomyLayer() if type(layer) in roomy else layer for layer in cache.layers]
    return cache


def expand(cache: Cache, source: Tensor) -> None:
    """Row k of the cache becomes a copy of row ``source[k]``."""
    for layer in cache.layers:
        layer.expand(source) if isinstance(layer, RoomyLayer) else _reorder(layer, source)


def shrink(cache: Cache, source: Sequence[int], device: torch.device) -> None:
    """Row k of the cache becomes row ``source[k]``; there are no more rows than before.

    Only rows whose place changes are copied, so let ``source[k]`` be k where it can.
    """
    changing = [(to, origin) for to, origin in enumerate(source) if to != origin]
    to, origin = moved(torch.tensor(changing, dtype=torch.long).view(-1, 2), device).unbind(dim=1)
    everything = moved(torch.tensor(source), device)
    for layer in cache.layers:
        layer.shrink(len(source), (to, origin)) if isinstance(layer, RoomyLayer) else _reorder(layer, everything)


def reserve(cache: Cache, rows: int, columns: int) -> None:
    """Take buffers of so many rows and columns for all layers, which :func:`is_roomy`."""
    for layer in roomy_layers(cache):
        layer.reserve(rows, columns)


def settle(cache: Cache, rows: int, columns: int) -> None:
    """Let the first rows and columns of buffers be those that are there: forwards that are recorded do not say so."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer) and layer.get_seq_length() != columns:
            layer.show(rows, columns)


@contextlib.contextmanager
def as_buffers(cache: Cache, end: Tensor) -> Iterator[None]:
    """A forward of one token inside writes into column ``end`` of whole buffers, and attends to all that is in them.

    So it does the same to the same memory each time, whatever number ``end`` (``(1,)`` int64) holds. Its rows are those
    of the buffers; what it must not see is for its mask to say.
    """
    layers = roomy_layers(cache)
    try:
        for layer in layers:
            layer.end = end
        yield
    finally:
        for layer in layers:
            layer.end = None


def is_roomy(cache: Cache) -> bool:
    """Whether all layers are a :class:`RoomyLayer`."""
    return len(roomy_layers(cache)) == len(cache.layers) > 0


def roomy_layers(cache: Cache) -> list[RoomyLayer]:
    """The layers whose keys and values are in buffers."""
    return [layer for layer in cache.layers if isinstance(layer, RoomyLayer)]


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
