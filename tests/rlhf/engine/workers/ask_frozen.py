"""One rank of models that are only asked: python ask_frozen.py NAMES FILE; the main rank writes all answers."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from rlhf.engine.frozen import freeze
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import start_ranks, stop_ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 1))  # larger than what ZeRO-3 keeps whole


def main() -> None:
    ranks = start_ranks()
    config = EngineConfig(precision="float32")
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    answers = {}
    for name in sys.argv[1].split(","):
        asked = freeze(model(), ranks=ranks, config=config, placement=name, hidden_size=16)
        with torch.no_grad():
            answers[name] = [asked.forward(rows).flatten().tolist() for rows in inputs]
    if ranks.is_main:
        Path(sys.argv[2]).write_text(json.dumps(answers))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
