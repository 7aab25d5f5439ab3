"""Counts how often a host would wait for a GPU, on a CPU: reads of what was computed from tensors that are marked."""

import dataclasses
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from rlhf.engine.ranks import Ranks

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
METHODS = ("cpu", "tolist", "numpy")


class Waits(TorchDispatchMode):
    """``with Waits(tensors) as waits``: whatever is made of ``tensors`` inside is taken to be on a GPU.

    Attributes:
        places: where the host would have waited, by the lines of this project.
    """

    def __init__(self, tensors: Iterable[Any]) -> None:
        super().__init__()
        self.places: list[str] = []
        self._there: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.mark(tensors)

    def mark(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._there[value] = True
            elif dataclasses.is_dataclass(value):
                self.mark(getattr(value, field.name) for field in dataclasses.fields(value))
            elif isinstance(value, tuple | list):
                self.mark(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        given = [value for value in tree_iter((args, kwargs or {})) if isinstance(value, Tensor)]
        there = any(value in self._there for value in given)
        by_mask = name in ("index", "index_put", "index_put_") and any(each.dtype == torch.bool for each in given[1:])
        if there and (name in READS or by_mask):
            self._wait(name)
        found = func(*args, **(kwargs or {}))
        if there:
            self.mark(value for value in tree_iter(found) if isinstance(value, Tensor))
        return found

    def __enter__(self):
        self._before = {name: getattr(Tensor, name) for name in METHODS}
        for name, own in self._before.items():
            setattr(Tensor, name, self._watched(name, own))
        return super().__enter__()

    def __exit__(self, *error):
        for name, own in self._before.items():
            setattr(Tensor, name, own)
        return super().__exit__(*error)

    def _watched(self, name, own):
        def asked(values, *args, **options):
            if values not in self._there:
                return own(values, *args, **options)
            self._wait(name)
            if name != "cpu":
                return own(values, *args, **options)
            copy = values.detach().clone()
            del self._there[copy]
            return copy

        return asked

    def _wait(self, name: str) -> None:
        lines = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        where = next(frame for frame in reversed(lines) if not frame.filename.endswith("waits.py"))
        self.places.append(f"{name} {where.filename}:{where.lineno}")


def waits_of_a_step(engine: Any, task: Any) -> list[str]:
    """Where the host waits for the device in a step, once the first is done."""
    for number in range(2):
        batches = task.micro_batches(number)
        with Waits([*engine.module.parameters(), *batches]) as waits:
            for place, batch in enumerate(batches):
                engine.backward(task.loss(batch), last=place == len(batches) - 1)
            engine.step()
            task.step_metrics()
    return waits.places


NOWHERE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("meta"))


def losses_without_numbers(engine: Any, task: Any, *others: Any) -> list[Tensor]:
    """The losses of a step, their gradients taken, on a device that computes nothing.

    It has shapes alone. So it fails at any read of a number, and where tensors of two devices meet, as a GPU's would.

    Args:
        engine, task: of a stage; both are of no use afterwards.
        others: frozen models that the task asks.
    """
    for model in (engine, *others):
        model.module.to("meta")
        model.ranks = NOWHERE
    task._batches.ranks = NOWHERE
    losses = [task.loss(batch) for batch in task.micro_batches(0)]
    for loss in losses:
        loss.backward()
    return losses
