"""Seconds of the margin of optimal transport, by the number of pairs."""

import statistics
import time
from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import World, device

ROUNDS = 10


def cells(world: World) -> list[Cell]:
    return [Cell(part="margin", name="optimal transport", function=f"{__name__}:measure", seconds=10)]


def measure(world: World) -> dict[str, Any]:
    """Median seconds of plan, margins and telemetry over so many pairs."""
    return {f"seconds_{pairs}": _seconds(world, pairs) for pairs in world.sizes.plans}


def _seconds(world: World, pairs: int) -> float:
    import torch

    from reward.config import MarginConfig
    from reward.margin_maker import MarginMaker
    from reward.pairs import Pairs

    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, pairs, world.sizes.model["hidden_size"], generator=generator).to(device())
    rewards = torch.randn(2, pairs, generator=generator).to(device())
    positions = torch.arange(pairs, device=device())
    made = Pairs(
        positions=positions,
        chosen_rewards=rewards[0],
        rejected_rewards=rewards[1],
        chosen_embeddings=embeddings[0],
        rejected_embeddings=embeddings[1],
        data_margins=torch.zeros_like(rewards[0]),
    )
    maker, seconds = MarginMaker(MarginConfig(kind="ot"), total_steps=ROUNDS), []
    for step in range(ROUNDS):
        maker.start_step(step)
        if device() == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        float(maker.make(made, pairs).sum())
        maker.transport_metrics()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
