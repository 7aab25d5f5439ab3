"""Tensors on their way to a device, without waiting for it; and who waits all the same."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import TextIO

import torch
from torch import Tensor

WAITED = "called a synchronizing CUDA operation"
"""What torch says of a wait; it speaks of "synchronizing" when it is told to look for them, too."""


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``: from memory that a GPU reads by itself, so that nobody waits until it has."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def noted_waits() -> Iterator[list[str]]:
    """Note where this thread waits for the GPU inside the block, as far as torch knows: ``file:line`` of each time.

    Other warnings are passed on. ``torch.cuda.synchronize`` is not noted.
    """
    before, here, waits = torch.cuda.get_sync_debug_mode(), threading.get_ident(), []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def seen(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if WAITED not in str(message):
                show(message, category, filename, lineno, file, line)
            elif threading.get_ident() == here:
                waits.append(f"{filename}:{lineno}")

        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", f".*{WAITED}")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
