"""Checks that numerical code makes on its inputs; each names the tensor at fault and what it holds."""

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor | None) -> None:
    """Refuse tensors of unlike shapes, which arithmetic would broadcast; ``None`` entries are skipped.

    Raises:
        ValueError: with every name and shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        listing = ", ".join(f"'{name}': {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {listing}")


def check_finite(**tensors: Tensor | None) -> None:
    """Refuse NaN and infinity; ``None`` entries are skipped. Waits for the device.

    Raises:
        ValueError: with the first offending name and how many of its entries are not finite.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            bad = int(finite.numel() - finite.sum())
            raise ValueError(f"'{name}' has {bad} of {finite.numel()} entries that are not finite")


def check_range(low: float, high: float, **values: float) -> None:
    """Refuse numbers outside ``low <= value < high``, NaN among them.

    Raises:
        ValueError: with the name and the number.
    """
    for name, value in values.items():
        if not low <= value < high:
            raise ValueError(f"{name} must be in [{low}, {high}), not {value}")


def check_positive(**values: float) -> None:
    """Refuse numbers that are not greater than 0, NaN among them.

    Raises:
        ValueError: with the name and the number.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, not {value}")
