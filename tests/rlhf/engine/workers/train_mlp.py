"""One rank of a tiny regression: python train_mlp.py ENGINE STEPS OUTPUT [poison=STEP] [load=DIR] [save=DIR].

Every step is a global batch of 6 rows, cut into more micro-batches than there are rows per rank, with filler.
Writes the final weights and what each step reported.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from rlhf.engine.build import build_engine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(5, 16)
    first.weight.requires_grad_(False)  # some of it frozen, as with adapters
    return nn.Sequential(first, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def micro_batches(step: int, rank: int, ranks: int):
    """Rows of this rank, one at a time, with an empty one where another rank has more."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(7, 5, generator=generator)
    own = [rows[place : place + 1] for place in range(rank, 7, ranks)]
    return own + [rows[:0]] * (-(-7 // ranks) - len(own))


def main() -> None:
    kind, steps, output, *rest = sys.argv[1:]
    options = dict(part.split("=") for part in rest)
    ranks = start_ranks()
    engine = build_engine(
        model(),
        ranks=ranks,
        config=EngineConfig(
            kind="local" if kind == "local" else "deepspeed",
            deepspeed="zero0" if kind == "local" else kind,
            precision="float32",
        ),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_share=0.2, weight_decay=0.1, max_grad_norm=0.5),
        total_steps=int(steps),
        hidden_size=16,
        folder=Path(output).parent,
    )
    first = 0
    if "load" in options:
        engine.load(Path(options["load"]))
        first = int(options["from"])
    reports = []
    for step in range(first, int(options.get("until", steps))):
        batches = micro_batches(step, ranks.rank, ranks.world_size)
        for place, batch in enumerate(batches):
            out = engine.forward(batch if len(batch) else torch.zeros(1, 5))
            loss = (out**2).sum() / 7 if len(batch) else 0.0 * out.sum()
            if str(step) == options.get("poison") and ranks.rank == 0 and place == 0:
                loss = loss * float("inf")
            engine.backward(loss, last=place == len(batches) - 1)
        reports.append(engine.step())
    if "save" in options:
        folder = Path(options["save"])
        ranks.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        engine.save(folder)
    weights = engine.full_state_dict()
    if ranks.is_main:
        torch.save(weights, f"{output}.pt")
        rows = [{"applied": r.applied, "norm": r.grad_norm, "rate": r.learning_rate, "bad": r.bad_rank} for r in reports]
        Path(f"{output}.json").write_text(json.dumps(rows))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
