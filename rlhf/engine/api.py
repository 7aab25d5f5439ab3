"""What a stage knows of its engine."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from rlhf.engine.ranks import Ranks


@dataclass(frozen=True)
class StepInfo:
    """What happened to one optimizer step. ``applied`` is false, on all ranks, if it was not finite."""

    applied: bool
    grad_norm: float
    learning_rate: float
    scaler_overflow: bool = False
    """A float16 gradient overflowed although the loss was finite: the loss scale shrinks, nothing is wrong."""


class Engine(Protocol):
    """One model under training. ZeRO stage and precision are known only behind this."""

    ranks: Ranks
    module: nn.Module
    """The model, in training mode: without it, Transformers would do no gradient checkpointing."""
    description: str
    """One line that names optimizer, ZeRO stage and precision."""
    settings: dict[str, Any]
    """The resolved DeepSpeed JSON; empty for plain torch."""
    shared_out: bool
    """Whether each rank holds a share of the weights only (ZeRO-3)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; under ZeRO-3 all ranks must make the same calls."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss`` to the step. The update follows the sum over micro-batches and ranks.

        Args:
            loss: scalar. Divide by the global count, not by the ranks.
            last: whether this is the last micro-batch of the step; all ranks must agree.
        """

    def step(self) -> StepInfo:
        """Clip, update and move the schedule; or drop the step on all ranks if it is not finite."""

    def move_schedule(self, steps: int) -> None:
        """Have the learning rate stand where it is after ``steps`` steps, some of which were not taken."""

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and schedule into ``folder``. Every rank must call it."""

    def load(self, folder: Path) -> None:
        """Read back what :meth:`save` wrote, on this or on another number of ranks. Every rank must call it."""

    def whole(self, tensors: Sequence[Tensor], *, modify: bool = False) -> AbstractContextManager:
        """Parameters of the module whole on every rank inside; with ``modify`` the main rank's changes stay."""

    def release(self) -> None:
        """Let go of weights that are still whole after a forward pass. Every rank must call it."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights on the CPU of the main rank, empty elsewhere. Every rank must call it."""
