"""One rank of a tiny regression that changes its number of ranks: python other_ranks.py save|load FOLDER KIND...

save: three steps, a save, two more steps. load: a fresh engine reads that and takes the two steps. Both write down,
on the main rank, what the optimizer held at the save, and the weights at the end.
"""

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn
from train_mlp import train

from rlhf.engine.build import build_engine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks

SAVED_AFTER, STEPS = 3, 5


class InItsPrecision(nn.Sequential):
    def forward(self, rows):
        return super().forward(rows.to(self[0].weight.dtype)).float()


def model() -> nn.Module:
    """Frozen, decayed and undecayed parameters. The last are one number: under ZeRO a rank has nothing of them."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 15), nn.Tanh(), nn.Linear(15, 11, bias=False), nn.Tanh(), nn.Linear(11, 1)]
    layers[0].requires_grad_(False)
    return InItsPrecision(*layers)


def new_engine(kind, ranks):
    """``kind``: local, or a DeepSpeed configuration with "-bfloat16" behind it if that is the precision."""
    source, _, precision = kind.partition("-")
    return build_engine(
        model(),
        ranks=ranks,
        config=EngineConfig(
            kind="local" if kind == "local" else "deepspeed",
            deepspeed="zero0" if kind == "local" else source,
            precision=precision or "float32",
        ),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_share=0.2, weight_decay=0.1, max_grad_norm=0.5),
        total_steps=STEPS,
        hidden_size=16,
    )


def held(engine) -> dict:
    """Every rank must call it: master weights and moments by name, counters and settings of each part."""
    if not getattr(engine, "stage", 0):
        return {}
    optimizer = engine._optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):  # done after the first group's step, and never again
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            tensors[name, "weight"] = safe_get_full_fp32_param(parameter).flatten()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[name, key] = safe_get_full_optimizer_state(parameter, key).flatten()
    parts = {
        "steps": [float(state["step"]) for state in optimizer.state.values()],
        "decays": [group["weight_decay"] for group in optimizer.param_groups],
        "rates": [group["lr"] for group in optimizer.param_groups],
    }
    return {"tensors": tensors, "parts": engine.ranks.gather_objects(parts)}


def main() -> None:
    action, folder, kinds = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    ranks = start_ranks()
    for kind in kinds:
        state = folder / kind
        ranks.on_main(lambda state=state: state.mkdir(parents=True, exist_ok=True))
        engine = new_engine(kind, ranks)
        if action == "save":
            train(engine, range(SAVED_AFTER))
            engine.save(state)
        else:
            engine.load(state)
        found = {"held": held(engine)}
        found["reports"] = train(engine, range(SAVED_AFTER, STEPS))
        found["weights"] = engine.full_state_dict()
        if ranks.is_main:
            torch.save(found, folder / f"{kind}.{action}{ranks.world_size}.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
