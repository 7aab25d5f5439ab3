"""How often the host waits for the device in a training step."""

import warnings
from collections import Counter
from typing import Any

from benchmarks.gpu import stages
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import World, has_gpu

STAGES = {"reward": ("reward.stage", "RewardTask"), "preference": ("policy.preference.stage", "PreferenceTask")}
STEPS, LOOKED_AT = 5, 3
"""Steps of the run, and which of them is looked at, from 0: by then all has come that comes with steps."""


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
    from rlhf.engine.ranks import start_ranks, stop_ranks

    module, name = STAGES[stage]
    counted: Counter[str] = Counter()
    _watch(module, name, counted)
    ranks = start_ranks()
    rows = next(iter(world.rows))
    model = world.reward if stage == "reward" else world.policy
    settings = [f"output={world.work / 'runs' / f'syncs-{stage}'}", f"model.path={model}", f"train.max_steps={STEPS}"]
    settings += [f"train.global_batch_size={world.sizes.pairs}", *(["loss.kind=sigmoid"] if stage != "reward" else [])]
    settings += [f"train.micro_batch_tokens={world.sizes.micro_batch_tokens}", "optim.learning_rate=1e-6"]
    try:
        stages.run(stage, [*settings, *stages.rows_settings(world, rows, world.sizes.tokens[0])], ranks)
    finally:
        stop_ranks()
    most = [f"{place} ({count})" for place, count in counted.most_common(3)]
    return {
        "syncs": sum(counted.values()),
        "places": len(counted),
        "most": most,
        "counted": "waits" if has_gpu() else "reads",
    }


def _watch(module: str, name: str, counted: Counter[str]) -> None:
    """Count in step ``LOOKED_AT`` of the stage's task."""
    import importlib

    stage = importlib.import_module(module)

    class Watched(getattr(stage, name)):
        _counting: Any = None

        def micro_batches(self, step: int) -> Any:
            if step == LOOKED_AT:
                self._counting = _Waits(counted) if has_gpu() else _Reads(counted)
                self._counting.__enter__()
            return super().micro_batches(step)

        def step_metrics(self) -> dict[str, float]:
            metrics = super().step_metrics()
            if self._counting is not None:
                self._counting.__exit__(None, None, None)
                self._counting = None
            return metrics

    setattr(stage, name, Watched)


class _Waits:
    """What torch warns of."""

    def __init__(self, counted: Counter[str]) -> None:
        self._counted, self._caught = counted, warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        import torch

        self._found = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self._asked = torch.cuda.synchronize
        torch.cuda.synchronize = self._synchronize  # which is not warned of

    def __exit__(self, *error: Any) -> None:
        import torch

        torch.cuda.synchronize = self._asked
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(*error)
        for each in self._found or ():
            if "synchroniz" in str(each.message):
                self._counted[_short(each.filename, each.lineno)] += 1

    def _synchronize(self, *given: Any, **named: Any) -> None:
        import sys

        caller = sys._getframe(1)
        self._counted[_short(caller.f_code.co_filename, caller.f_lineno)] += 1
        self._asked(*given, **named)


def _reads_of() -> Any:
    import sys

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
    waits |= {torch.ops.aten.masked_select.default, torch.ops.aten.is_nonzero.default}

    class Reads(TorchDispatchMode):
        def __init__(self, counted: Counter[str]) -> None:
            super().__init__()
            self._counted = counted

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in waits:
                frame = sys._getframe(1)
                while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
                    frame = frame.f_back
                self._counted[_short(frame.f_code.co_filename, frame.f_lineno)] += 1
            return func(*args, **(kwargs or {}))

    return Reads


def _Reads(counted: Counter[str]) -> Any:
    return _reads_of()(counted)


def _short(file: str, line: int) -> str:
    return f"{'/'.join(file.split('/')[-3:])}:{line}"
