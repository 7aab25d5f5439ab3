"""Turns a role of a recipe into an engine, a frozen model, or the DeepSpeed JSON of either."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rlhf.core.errors import ConfigError
from rlhf.engine.api import Engine
from rlhf.engine.build import build_engine, frozen_settings, run_values
from rlhf.engine.deepspeed_config import resolve, zero_stage
from rlhf.engine.frozen import Frozen, freeze
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.roles import REPLICATED, ModelRole, role_named
from rlhf.train.packing import allow_packing


def engine_of(
    role: ModelRole, module: nn.Module, engine: EngineConfig, ranks: Ranks, *, steps: int, hidden_size: int
) -> Engine:
    """Wrap the module of a trained role as the recipe says."""
    built = build_engine(
        module,
        ranks=ranks,
        config=replace(engine, deepspeed=role.placement),
        optimizer=role.optimizer,
        total_steps=steps,
        hidden_size=hidden_size,
    )
    allow_packing(built)
    return built


def frozen_of(role: ModelRole, module: nn.Module, engine: EngineConfig, ranks: Ranks, *, hidden_size: int) -> Frozen:
    """Place the module of a role that is only asked as the recipe says."""
    placed = freeze(module, ranks=ranks, config=engine, placement=role.placement, hidden_size=hidden_size)
    allow_packing(placed)
    return placed


def is_shared_out(role: ModelRole, engine: EngineConfig) -> bool:
    """Whether the ranks share out the weights of a role that has its own: by ZeRO-3, so that none holds it whole."""
    if engine.kind == "local" or role.placement == REPLICATED:
        return False
    return zero_stage(role.placement, "train" if role.trained else "frozen") == 3


def deepspeed_settings(
    role: ModelRole,
    models: Sequence[ModelRole],
    engine: EngineConfig,
    *,
    world_size: int,
    local_size: int,
    hidden_size: int,
) -> dict[str, Any]:
    """The resolved DeepSpeed JSON of one of ``models``; empty for plain torch, and for what every rank holds whole.

    Raises:
        ConfigError: if the stage would refuse it.
    """
    sizes = {"world_size": world_size, "local_size": local_size, "hidden_size": hidden_size}
    if not role.trained:
        whole = role.inside or role.placement == REPLICATED
        return {} if whole else frozen_settings(engine, role.placement, **sizes)
    if engine.kind == "local":
        return {}
    resolved = resolve(role.placement, run_values(engine, role.optimizer, **sizes))
    host = role_named(models, role.inside)
    if host is not None and is_shared_out(host, engine):
        raise not_inside_shares(role)
    return resolved


def not_inside_shares(role: ModelRole) -> ConfigError:
    """Nothing can be trained inside weights that are shared out among the ranks."""
    return ConfigError(f"{role.setting} does not go with ZeRO-3; take engine.deepspeed=zero2")
