"""How often the host waits for the device in a training step."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import stages
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import World, has_gpu

STAGES = ("reward", "preference")
LOOKED_AT = 3
"""The step that is looked at, from 0: by then all has come that comes with steps."""


def cells(world: World) -> list[Cell]:
    return [
        Cell(part="syncs", name=stage, function=f"{__name__}:measure", arguments={"stage": stage}, seconds=15)
        for stage in STAGES
    ]


def measure(world: World, *, stage: str) -> dict[str, Any]:
    """How often, and the three places where most: from the rows of a step to its metrics.

    On a GPU torch itself says when the host waits. On a CPU there is nothing to wait for: what would make the host
    wait there is counted, values and sizes that Python reads of tensors.
    """
    counted: Counter[str] = Counter()
    stages.run_watched(
        world, f"syncs-{stage}", stage, LOOKED_AT, lambda: _waits(counted) if has_gpu() else _reads(counted)
    )
    most = [f"{place} ({count})" for place, count in counted.most_common(3)]
    return {
        "syncs": sum(counted.values()),
        "places": len(counted),
        "most": most,
        "counted": "waits" if has_gpu() else "reads",
    }


@contextlib.contextmanager
def _waits(counted: Counter[str]) -> Iterator[None]:
    """What torch warns of, and ``torch.cuda.synchronize``, which it does not warn of."""
    import torch

    from rlhf.core.moving import noted_waits

    asked = torch.cuda.synchronize

    def synchronize(*given: Any, **named: Any) -> None:
        caller = sys._getframe(1)
        counted[_short(f"{caller.f_code.co_filename}:{caller.f_lineno}")] += 1
        asked(*given, **named)

    torch.cuda.synchronize = synchronize
    try:
        with noted_waits() as waits:
            yield
    finally:
        torch.cuda.synchronize = asked
    counted.update(map(_short, waits))


def _reads(counted: Counter[str]) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
    waits |= {torch.ops.aten.masked_select.default, torch.ops.aten.is_nonzero.default}

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in waits:
                frame = sys._getframe(1)
                while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
                    frame = frame.f_back
                counted[_short(f"{frame.f_code.co_filename}:{frame.f_lineno}")] += 1
            return func(*args, **(kwargs or {}))

    return Reads()


def _short(place: str) -> str:
    return "/".join(place.split("/")[-3:])
