"""The sampler's cache against plain tensors, whatever happens to it in which order."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from policy.generation import cache as caches
from policy.generation.cache import RoomyLayer
from policy.generation.rows import _closed_up

CPU = torch.device("cpu")


def cache_of(keys: list[torch.Tensor]) -> DynamicCache:
    """Prompts in a cache of one layer for each of ``(R, H, C, D)`` keys; values are their negatives."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer() for _ in keys]
    for layer, each in zip(cache.layers, keys, strict=True):
        layer.update(each, -each)
    return cache


def drawn(generator: np.random.Generator, rows: int, columns: int) -> list[torch.Tensor]:
    return [torch.from_numpy(generator.normal(size=(rows, 2, columns, 3))) for _ in range(2)]


def ending(keys: torch.Tensor, columns: int) -> torch.Tensor:
    """The last so many columns; 0 where there are none."""
    missing = max(0, columns - keys.shape[2])
    return torch.nn.functional.pad(keys, (0, 0, missing, 0))[:, :, missing + keys.shape[2] - columns :]


class Pair:
    """A cache, and the tensors that it should hold."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self.keys = drawn(generator, *generator.integers(1, 6, 2))
        self.cache = cache_of(self.keys)

    @property
    def size(self) -> tuple[int, int]:
        return self.keys[0].shape[0], self.keys[0].shape[2]

    def number(self, most: int) -> int:
        return int(self.generator.integers(1, most + 1))

    def token(self) -> None:
        new = drawn(self.generator, self.size[0], 1)
        for layer, each in zip(self.cache.layers, new, strict=True):
            layer.update(each, -each)
        self.keys = [torch.cat(each, dim=2) for each in zip(self.keys, new, strict=True)]

    def recorded_token(self) -> None:
        """As a recorded forward writes it: for all rows of the buffers, and views do not follow."""
        rows, columns = self.size
        buffers = self.cache.layers[0].buffers
        if buffers is None or buffers[0].shape[2] == columns or not torch.isfinite(buffers[0]).all():
            return
        new = drawn(self.generator, len(buffers[0]), 1)
        with caches.as_buffers(self.cache, torch.tensor([columns])):
            for layer, each in zip(self.cache.layers, new, strict=True):
                found = layer.update(each, -each)
                assert found[0] is layer.buffers[0], "all of it is attended to"
        self.keys = [torch.cat([old, each[:rows]], dim=2) for old, each in zip(self.keys, new, strict=True)]

    def reserve(self) -> None:
        rows, columns = self.size
        caches.reserve(self.cache, rows + self.number(4) - 1, columns + self.number(6))
        assert all(torch.isfinite(each).all() for layer in self.cache.layers for each in layer.buffers)

    def shrink(self) -> None:
        rows, _ = self.size
        going_on = np.sort(self.generator.choice(rows, self.number(rows), replace=False))
        source = _closed_up(going_on)
        caches.shrink(self.cache, source, CPU)
        self.keys = [each[source] for each in self.keys]

    def leave_out_columns(self) -> None:
        columns = self.number(self.size[1])
        caches.align(self.cache, [], columns)
        self.keys = [ending(each, columns) for each in self.keys]

    def join(self) -> None:
        others = drawn(self.generator, self.number(3), self.number(6))
        columns = self.number(max(self.size[1], others[0].shape[2]) + 1)
        caches.align(self.cache, [cache_of(others)], columns)
        pairs = zip(self.keys, others, strict=True)
        self.keys = [torch.cat([ending(each, columns) for each in both]) for both in pairs]

    def expand(self) -> None:
        source = torch.from_numpy(self.generator.integers(0, self.size[0], self.number(5)))
        caches.expand(self.cache, source)
        self.keys = [each[source] for each in self.keys]


OPERATIONS = {
    Pair.token: 0.2,
    Pair.recorded_token: 0.25,
    Pair.reserve: 0.15,
    Pair.shrink: 0.15,
    Pair.leave_out_columns: 0.1,
    Pair.join: 0.1,
    Pair.expand: 0.05,
}
"""With how often each comes."""


@pytest.mark.parametrize("part", range(4))
def test_any_order_of_operations_leaves_what_plain_tensors_hold(part):
    for seed in range(100 * part, 100 * part + 100):
        pair, done = Pair(np.random.default_rng(seed)), []
        for operation in pair.generator.choice([*OPERATIONS], 25, p=[*OPERATIONS.values()]):
            operation(pair)
            done.append(operation.__name__)
            caches.settle(pair.cache, *pair.size)
            for layer, keys in zip(pair.cache.layers, pair.keys, strict=True):
                assert torch.equal(layer.keys, keys) and torch.equal(layer.values, -keys), done
