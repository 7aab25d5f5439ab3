"""A CUDA graph on a CPU: operations are recorded once, and done again on the same memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.waits import READS


class Tape:
    """A :data:`policy.generation.recorded.Record`, and a count of what it did.

    As under a graph, nothing but the operations happens again: no Python, and no number that Python knew. What reads
    from the device fails.

    Attributes:
        recorded, replayed: how often.
        rows: of each result when it was recorded.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.rows: list[int] = []

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        compute()
        operations = _Operations()
        with operations:
            found = compute()
        self.recorded += 1
        self.rows.append(len(found))

        def again() -> Tensor:
            self.replayed += 1
            operations.replay()
            return found

        found.fill_(torch.nan)  # a graph computes nothing while it is recorded
        return again


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        for func, args, kwargs, found in self._done:
            for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
