"""What the device gives to matrix products: the limit that training steps are measured by."""

import statistics
import time
from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import World, device, has_gpu

ROUNDS = 5


def cells(world: World) -> list[Cell]:
    return [Cell(part="limit", name="matrix products", function=f"{__name__}:measure", seconds=10)]


def measure(world: World) -> dict[str, Any]:
    """TFLOP/s of a large square product, and of the products of the model's MLP."""
    import torch

    kind = torch.bfloat16 if has_gpu() else torch.float32
    sizes = world.sizes
    wide, tokens = sizes.model["intermediate_size"], sizes.micro_batch_tokens
    shapes = {
        "square": (sizes.square, sizes.square, sizes.square),
        "up": (tokens, sizes.model["hidden_size"], wide),
        "down": (tokens, wide, sizes.model["hidden_size"]),
    }
    found = {name: _tflops(shape, kind, device()) for name, shape in shapes.items()}
    return {"tflops": max(found.values()), **{f"{name}_tflops": value for name, value in found.items()}}


def _tflops(shape: tuple[int, int, int], kind: Any, where: str) -> float:
    import torch

    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=where).to(kind)
    right = torch.randn(inner, columns, device=where).to(kind)
    repeats = max(1, int(4e13 / (2 * rows * inner * columns))) if where == "cuda" else 3
    seconds = []
    for _ in range(ROUNDS):
        _wait(where)
        began = time.perf_counter()
        for _ in range(repeats):
            left @ right
        _wait(where)
        seconds.append((time.perf_counter() - began) / repeats)
    return 2 * rows * inner * columns / statistics.median(seconds) / 1e12


def _wait(where: str) -> None:
    import torch

    if where == "cuda":
        torch.cuda.synchronize()
