"""Tensors on their way to a device, without waiting for it."""

import torch
from torch import Tensor


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``: from memory that a GPU reads by itself, so that nobody waits until it has."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
