"""One rank of models that are only asked: python ask_frozen.py NAMES FILE; the main rank writes all answers."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from rlhf.engine.frozen import freeze, share_in_float32
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks, start_ranks, stop_ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 1))  # larger than what ZeRO-3 keeps whole


class Mixed(nn.Module):
    """Weights of two types, one of them used by another module than its own, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 96).bfloat16(), nn.Linear(96, 64).bfloat16()
        self.last = nn.Linear(64, 1)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 96).bfloat16())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.first.weight.dtype == self.second.bias.dtype == torch.float32, "whoever asks is told so"
        states = torch.tanh(self.first(rows)) * self.scale
        return self.last(states @ self.first.weight + self.second(states))


def in_float32(inputs: torch.Tensor, ranks: Ranks) -> dict[str, list]:
    """Answers of weights that are shared out as they are, and of a whole model in float32."""
    asked = share_in_float32(Mixed(), ranks=ranks, hidden_size=64)
    whole = Mixed().float()
    kept = {name: str(each.ds_tensor.dtype) for name, each in asked.module.named_parameters()}
    with torch.no_grad():
        found = {
            "shared": [asked.forward(rows).flatten().tolist() for rows in inputs],
            "whole": [whole(rows).flatten().tolist() for rows in inputs],
        }
    sizes = [each.numel() for each in asked.module.parameters()]
    return {**found, "kept": sorted(set(kept.values())), "last": kept["last.weight"], "left whole": sum(sizes)}


def main() -> None:
    ranks = start_ranks()
    config = EngineConfig(precision="float32")
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    answers = {}
    for name in sys.argv[1].split(","):
        asked = freeze(model(), ranks=ranks, config=config, placement=name, hidden_size=16)
        with torch.no_grad():
            answers[name] = [asked.forward(rows).flatten().tolist() for rows in inputs]
    answers["in float32"] = in_float32(inputs, ranks)
    if ranks.is_main:
        Path(sys.argv[2]).write_text(json.dumps(answers))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
