"""A model that is only asked, never trained: whole on every rank, or sharded by ZeRO-3."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf.engine.build import frozen_settings, frozen_values
from rlhf.engine.deepspeed_config import resolve
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks


class Frozen(Protocol):
    """What can be asked; :class:`rlhf.engine.api.Engine` can be, too."""

    ranks: Ranks
    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; when sharded, all ranks must make the same calls."""

    def whole(self, tensors: Sequence[Tensor], *, modify: bool = False) -> contextlib.AbstractContextManager:
        """Parameters whole on every rank inside; see :meth:`rlhf.engine.api.Engine.whole`."""


class ReplicatedModel:
    """A frozen model on every rank, whole; see :class:`Frozen`."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self.module = module.to(ranks.device).requires_grad_(False).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def whole(self, tensors: Sequence[Tensor], *, modify: bool = False) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


@torch.no_grad()
def move_towards(target: Frozen, source: Frozen, share: float) -> None:
    """Move the weights of ``target`` by ``share`` of the way to those of ``source``. Every rank must call it."""
    for mine, other in zip(target.module.parameters(), source.module.parameters(), strict=True):
        with source.whole([other]), target.whole([mine], modify=True):
            mine.lerp_(other.to(mine.dtype), share)


def freeze(module: nn.Module, *, ranks: Ranks, config: EngineConfig, placement: str, hidden_size: int) -> Frozen:
    """Place ``module`` for forwards without gradient.

    Args:
        module: on the CPU, the same on every rank.
        ranks: who shares it.
        config: the engine section; the local engine cannot shard.
        hidden_size: width of the model, for the sizes that a configuration leaves at "auto".
        placement: "replicated", or a DeepSpeed configuration for frozen models ("zero3", "zero3_offload", a path).
    Raises:
        ConfigError: if the configuration is not one for ZeRO-3, or the local engine is asked to shard.
    """
    if placement == "replicated":
        return ReplicatedModel(module, ranks)
    resolved = frozen_settings(
        config, placement, world_size=ranks.world_size, local_size=ranks.local_size, hidden_size=hidden_size
    )
    from rlhf.engine.zero import ShardedModel

    return ShardedModel(module, ranks=ranks, deepspeed_config=resolved)


def let_go(model: Frozen) -> None:
    """Give the memory of a shared model back, which is asked no longer: DeepSpeed holds on to modules that are gone."""
    for parameter in model.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.ds_tensor.data = torch.empty(0, dtype=parameter.dtype)


KEEPING = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
"""How many elements ZeRO-3 may gather ahead, and keep whole for their next use."""


def share_in_float32(
    module: nn.Module, *, ranks: Ranks, hidden_size: int, fill: Callable[[nn.Parameter], None] | None = None
) -> Frozen:
    """Share ``module`` out among the ranks by ZeRO-3, to be computed in float32, whatever its weights are.

    It is asked about a few rows, so memory counts and time does not: shares keep the type of the weights, and a weight
    is whole, and float32, for as long as it is used.

    Args:
        module: on the CPU, the same on every rank. Every rank must call this.
        ranks: who shares it.
        hidden_size: width of the model.
        fill: called with one parameter after the other, for values that are not there yet.
    """
    sizes = {"world_size": ranks.world_size, "local_size": ranks.local_size, "hidden_size": hidden_size}
    resolved = resolve("zero3", frozen_values(EngineConfig(precision="float32"), **sizes), role="frozen")
    resolved["zero_optimization"] |= dict.fromkeys(KEEPING, 0)
    from rlhf.engine.shares import compute_in_float32
    from rlhf.engine.zero import ShardedModel

    placed = ShardedModel(module, ranks=ranks, deepspeed_config=resolved, fill=fill, as_they_are=True)
    compute_in_float32(placed.module)
    return placed
