"""How fast a run computes, and how much memory that takes: metrics of every step."""

import resource
from collections.abc import Mapping

import torch
from torch import nn

from rlhf.core.devices import PEAK_FLOPS
from rlhf.engine.ranks import Ranks
from rlhf.train.status import COUNTED


def flops_per_token(module: nn.Module) -> float:
    """Floating-point operations that training needs for a token, after Kaplan et al. (2020), arXiv:2001.08361, 2.1.

    A forward pass takes 2 for each number of a matrix, a backward pass once that for gradients of activations and once
    for those of weights that are trained. Embeddings, attention scores, repeated forwards under checkpointing and the
    passes of other models are not counted: this is what the model needs, not what was spent.
    """
    looked_up = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    every = trained = 0
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a rank holds a flat part of it
        if len(shape) < 2 or id(parameter) in looked_up:
            continue
        every += torch.Size(shape).numel()
        trained += torch.Size(shape).numel() * parameter.requires_grad
    return 4.0 * every + 2.0 * trained


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the data sheet of ``device`` promises; ``None`` where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> float:
    """GiB at most that this process has used so far: of a GPU what tensors took, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def throughput(
    metrics: Mapping[str, float], seconds: float, ranks: Ranks, *, token_flops: float | None
) -> dict[str, float]:
    """Rates of a step that took ``seconds`` on all ranks together.

    Args:
        metrics: of the step, with what was counted in it over all ranks.
        seconds: wall time of the step.
        ranks: how many share the work, on which kind of device.
        token_flops: :func:`flops_per_token`, where a step is training alone.
    """
    found = {"time/step_seconds": seconds, "memory/peak_gib": peak_memory(ranks.device)}
    found |= {f"time/{name}_per_second": metrics[name] / seconds for name in COUNTED if name in metrics}
    if "tokens" in metrics:
        each = metrics["tokens"] / seconds / ranks.world_size
        found["time/tokens_per_second_per_device"] = each
        if token_flops is not None:
            found["time/model_tflops_per_device"] = each * token_flops / 1e12
            peak = peak_flops(ranks.device)
            if peak is not None:
                found["time/mfu"] = each * token_flops / peak
    return found
