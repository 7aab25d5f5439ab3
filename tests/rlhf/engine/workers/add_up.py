"""One rank that adds up gradients: python add_up.py ENGINE FOLDER; the relative error of those of 256 micro-batches.

Weights are bfloat16; the loss is linear in them, so that the gradient of a step is the mean of its rows.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from rlhf.core.files import write_json
from rlhf.engine.build import build_engine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks

MICRO_BATCHES = 256


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    ranks = start_ranks()
    engine = build_engine(
        nn.Linear(64, 1, bias=False, dtype=torch.bfloat16),
        ranks=ranks,
        config=EngineConfig(deepspeed=kind, precision="bfloat16"),
        optimizer=OptimizerConfig(max_grad_norm=0.0),
        total_steps=9,
        hidden_size=64,
    )
    noise = torch.randn(MICRO_BATCHES, 64, generator=torch.Generator().manual_seed(0))
    rows = (0.7 + 0.02 * noise).bfloat16()
    for place, row in enumerate(rows):
        loss = engine.forward(row[None]).float().sum() / MICRO_BATCHES
        engine.backward(loss, last=place == len(rows) - 1)
    norm = engine.step().grad_norm
    exact = float(rows.double().mean(dim=0).norm())
    write_json(folder / "error.json", abs(norm / exact - 1))
    stop_ranks()


main()
