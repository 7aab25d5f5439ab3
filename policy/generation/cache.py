"""Keys and values of the rows being decoded, in buffers with room for the tokens to come."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's keys and values as views of larger buffers.

    ``DynamicLayer`` copies everything it has for each token; this one writes the new token into its place.
    The buffers are made when the prompts are in and :meth:`expand` is called.

    Args:
        room: tokens that can follow the prompt.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        rows, begin = key_states.shape[0], self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, new in zip(self._room_for_all(), (key_states, value_states), strict=True):
            buffer[:rows, :, begin:end] = new
        return self._show(rows, end)

    def expand(self, source: Tensor) -> None:
        """Row k becomes a copy of row ``source[k]``."""
        length = self.get_seq_length()
        buffers = []
        for held in (self.keys, self.values):
            assert held is not None, "expand() comes after the prompts"
            buffer = held.new_empty((len(source), held.shape[1], length + self._room, held.shape[3]))
            buffer[:, :, :length] = held.index_select(0, source)
            buffers.append(buffer)
        self._buffers = buffers[0], buffers[1]
        self._show(len(source), length)

    def shrink(self, rows: int, moves: tuple[Tensor, Tensor]) -> None:
        """Keep the first ``rows`` rows, after rows ``moves[1]`` have taken the places ``moves[0]``."""
        length = self.get_seq_length()
        to, origin = moves
        for buffer in self._room_for_all():
            buffer[to, :, :length] = buffer[origin, :, :length]
        self._show(rows, length)

    def _show(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:rows, :, :length] for buffer in self._room_for_all())
        self.keys, self.values = keys, values
        return keys, values

    def _room_for_all(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None, "expand() comes between the prompts and the first token"
        return self._buffers


def new_cache(config: PretrainedConfig, room: int) -> Cache:
    """An empty cache for the layers of a model.

    Args:
        config: of the model. Its layers with full attention become :class:`RoomyLayer`; others (sliding windows,
            linear attention) stay what Transformers makes them.
        room: tokens that can follow the prompts.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
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


def _reorder(layer: Any, source: Tensor) -> None:
    """Transformers' own way, for any of its kinds of layers."""
    layer.reorder_cache(source)
