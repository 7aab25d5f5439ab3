"""Where the time of a step goes on a GPU: by kinds of kernels, and how long the GPU has nothing to do."""

import re
import time
from typing import Any

from benchmarks.gpu import rollouts, stages
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import Skipped, World, has_gpu

LOOKED_AT = 3
KINDS = {
    "attention": r"flex|tem_fused|flash|fmha|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|cublas",
    "optimizer": r"adam|multi_tensor|lerp|addcdiv",
    "copies": r"memcpy|memset|copy|cat_array|CatArray",
    "sums and norms": r"reduce|softmax|norm",
    "indices": r"index|gather|scatter|embedding|sort|scan",
    "one by one": r"elementwise|poi_fused|per_fused|red_fused|triton",
}
"""Patterns of the names of kernels, the first that fits."""
OTHER = "other"


def cells(world: World) -> list[Cell]:
    return [
        Cell(
            part="profile",
            name=f"{stage}{', Liger' if kernels == 'liger' else ''}",
            function=f"{__name__}:measure",
            arguments={"stage": stage, "kernels": kernels},
            seconds=20,
        )
        for stage, kernels in (("reward", "none"), ("reward", "liger"), ("preference", "none"), ("rloo", "none"))
    ]


def measure(world: World, *, stage: str, kernels: str) -> dict[str, Any]:
    """Seconds of a step by kinds of kernels, and the longest ones; torch's table goes to the log."""
    if not has_gpu():
        raise Skipped("there is no GPU")
    taken: dict[str, Any] = {}
    if stage == "rloo":
        stages.watch_step("ppo", 1, lambda: _Profile(taken))
        rollouts.measure(world, kind="rloo", side="ours")
    else:
        name = f"profile-{stage}-{kernels}"
        stages.run_watched(world, name, stage, LOOKED_AT, lambda: _Profile(taken), f"model.kernels={kernels}")
    return taken


class _Profile:
    """A context that leaves what it saw in ``taken``."""

    def __init__(self, taken: dict[str, Any]) -> None:
        self._taken = taken

    def __enter__(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        self._profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
        self._profile.__enter__()
        self._began = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        import torch

        torch.cuda.synchronize()
        self._taken["seconds"] = time.perf_counter() - self._began
        self._profile.__exit__(*error)
        events = self._profile.events()
        kernels = [(each.name, each.time_range) for each in events if str(each.device_type).endswith("CUDA")]
        by_kind: dict[str, float] = {}
        by_name: dict[str, list[float]] = {}
        for name, span in kernels:
            kind = kind_of(name)
            by_kind[kind] = by_kind.get(kind, 0.0) + span.elapsed_us() / 1e6
            by_name.setdefault(name, []).append(span.elapsed_us() / 1e6)
        self._taken["kinds"] = dict(sorted(by_kind.items(), key=lambda item: -item[1]))
        self._taken["busy"] = _covered([(span.start, span.end) for _, span in kernels]) / 1e6
        longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]
        self._taken["longest"] = [[name[:160], len(times), sum(times)] for name, times in longest]
        print(self._profile.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=70))
        print(self._profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
