"""A model that is only asked, never trained: whole on every rank, or sharded by ZeRO-3."""

from typing import Any, Protocol

from torch import nn

from rlhf.core.errors import ConfigError
from rlhf.engine.build import precision_of
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks


class Frozen(Protocol):
    """What can be asked; :class:`rlhf.engine.api.Engine` can be, too."""

    ranks: Ranks
    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; when sharded, all ranks must make the same calls."""


class ReplicatedModel:
    """See :class:`Frozen`; every rank holds all weights."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self.module = module.to(ranks.device).requires_grad_(False).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


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
    if config.kind == "local":
        raise ConfigError(f"a frozen model placed by {placement} needs engine.kind=deepspeed, not local")
    from rlhf.engine.zero import ShardedModel

    return ShardedModel(
        module, ranks=ranks, source=placement, precision=precision_of(config), hidden_size=hidden_size
    )
