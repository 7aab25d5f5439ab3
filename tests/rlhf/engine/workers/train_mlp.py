"""One rank of a tiny regression: python train_mlp.py ENGINE FOLDER.

Every step is a global batch of 7 rows, one row a micro-batch, with filler on ranks that have fewer. Trains straight
through, with one poisoned step, and with a save, a fresh engine and a load in the middle; the main rank writes the
final weights of each, what its steps reported, and how often the later ones told the device to be waited for.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from rlhf.core.errors import CheckpointError
from rlhf.engine.build import build_engine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks

STEPS = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(5, 16)
    first.weight.requires_grad_(False)  # some of it frozen, as with adapters
    layers = nn.Sequential(first, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return layers.eval()  # as Transformers hands models over


def micro_batches(step: int, rank: int, ranks: int):
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
    own = [rows[place : place + 1] for place in range(rank, 7, ranks)]
    return own + [rows[:0]] * (-(-7 // ranks) - len(own))


def new_engine(kind, ranks, folder):
    return build_engine(
        model(),
        ranks=ranks,
        config=EngineConfig(
            kind="local" if kind == "local" else "deepspeed",
            deepspeed="zero0" if kind == "local" else kind,
            precision="float32",
            nvme_path=str(folder / "nvme"),
        ),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_share=0.2, weight_decay=0.1, max_grad_norm=0.5),
        total_steps=STEPS,
        hidden_size=16,
    )


def train(engine, steps, poison=None):
    assert engine.module.training
    reports = []
    for step in steps:
        batches = micro_batches(step, engine.ranks.rank, engine.ranks.world_size)
        for place, batch in enumerate(batches):
            out = engine.forward(batch if len(batch) else torch.zeros(1, 5))
            loss = (out**2).sum() / 7 if len(batch) else 0.0 * out.sum()
            if step == poison and engine.ranks.is_main and place == 0:
                loss = loss * float("inf")
            engine.backward(loss, last=place == len(batches) - 1)
        reports.append(asdict(engine.step()))
    return reports


def counted_waits():
    """A list that grows with each wait that DeepSpeed asks the accelerator for; a CPU's does nothing."""
    from deepspeed.accelerator import get_accelerator

    waits = []
    type(get_accelerator()).synchronize = lambda *given: waits.append(1)
    return waits


def compared_norms(engine):
    """A list of pairs that grows with each step: the norm as ours is computed, and as DeepSpeed's own is."""
    optimizer, norms = engine._optimizer, []
    if "scaled_global_norm" in vars(optimizer):
        ours = optimizer.scaled_global_norm

        def both():
            norms.append((float(ours()), float(type(optimizer).scaled_global_norm(optimizer))))
            return ours()

        optimizer.scaled_global_norm = both
    return norms


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    ranks = start_ranks()
    ranks.on_main(lambda: (folder / "state").mkdir(parents=True, exist_ok=True))
    results = {}

    straight = new_engine(kind, ranks, folder)
    norms = compared_norms(straight) if kind != "local" else []
    reports = train(straight, range(3))
    straight.save(folder / "state")
    waits = counted_waits()
    reports += train(straight, range(3, STEPS))
    waited = len(waits)
    results["straight"] = straight.full_state_dict(), reports

    resumed = new_engine(kind, ranks, folder)
    try:
        resumed.load(folder / "state")
        reports = train(resumed, range(3, STEPS))
    except CheckpointError as error:
        reports = [str(error)]
    results["resumed"] = resumed.full_state_dict(), reports

    poisoned = new_engine(kind, ranks, folder)
    reports = train(poisoned, range(STEPS), poison=2)
    results["poisoned"] = poisoned.full_state_dict(), reports

    if ranks.is_main:
        torch.save({name: weights for name, (weights, _) in results.items()}, folder / "weights.pt")
        told = {name: rows for name, (_, rows) in results.items()} | {"waits": waited, "norms": norms}
        (folder / "reports.json").write_text(json.dumps(told))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
