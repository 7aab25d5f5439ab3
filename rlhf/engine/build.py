"""Builds the engine that a recipe's engine section asks for."""

from typing import Any

import torch
from torch import nn

from rlhf.core.errors import ConfigError
from rlhf.engine.api import Engine
from rlhf.engine.deepspeed_config import RunValues, resolve
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import EngineConfig, OptimizerConfig, Precision
from rlhf.engine.ranks import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def precision_of(config: EngineConfig) -> Precision:
    """The precision of the run; "auto" is bfloat16 on a GPU that has it, else float32."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if has_bfloat16() and config.kind == "deepspeed" else "float32"


def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16: PyTorch also says yes where it is emulated (V100, T4)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def check_precision(config: EngineConfig, device: torch.device, setting: str = "engine.precision") -> None:
    """Refuse a precision that is not there on ``device``; ``setting`` is its key in the recipe.

    Raises:
        ConfigError: if ranks on ``device`` cannot train in the precision of the recipe.
    """
    if config.precision == "float16" and device.type == "cpu":
        raise ConfigError(
            f"{setting} = float16 needs a GPU, and this rank has none: take float32, bfloat16 or auto"
        )


def run_values(
    config: EngineConfig, optimizer: OptimizerConfig, *, world_size: int, local_size: int, hidden_size: int | None
) -> RunValues:
    """What DeepSpeed has to be told of a run that trains on ``world_size`` ranks, ``local_size`` of them a node."""
    return RunValues(
        precision=precision_of(config),
        gradient_clipping=optimizer.max_grad_norm,
        world_size=world_size,
        local_size=local_size,
        hidden_size=hidden_size,
        nvme_path=config.nvme_path,
    )


def frozen_values(config: EngineConfig, *, world_size: int, local_size: int, hidden_size: int | None) -> RunValues:
    """What DeepSpeed has to be told of a model that is only asked, without gradient; see :func:`run_values`."""
    return RunValues(
        precision=precision_of(config),
        gradient_clipping=0.0,
        world_size=world_size,
        local_size=local_size,
        hidden_size=hidden_size,
        nvme_path=config.nvme_path,
    )


def frozen_settings(
    config: EngineConfig, placement: str, *, world_size: int, local_size: int, hidden_size: int | None
) -> dict[str, Any]:
    """The resolved DeepSpeed JSON of a model that is only asked, and sharded by ``placement``.

    Raises:
        ConfigError: if the configuration is not one for ZeRO-3, or the local engine is asked to shard.
    """
    if config.kind == "local":
        raise ConfigError(f"a frozen model placed by {placement} needs engine.kind=deepspeed, not local")
    values = frozen_values(config, world_size=world_size, local_size=local_size, hidden_size=hidden_size)
    resolved = resolve(placement, values, role="frozen")
    stage = resolved.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise ConfigError(f"{placement}: a frozen model is sharded by ZeRO-3, and this is stage {stage}")
    return resolved


def build_engine(
    module: nn.Module,
    *,
    ranks: Ranks,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    total_steps: int,
    hidden_size: int,
) -> Engine:
    """Wrap ``module`` for training; ``engine.settings`` is then the resolved DeepSpeed JSON.

    Raises:
        ConfigError: if engine, precision and DeepSpeed JSON do not go together.
    """
    precision = precision_of(config)
    if config.kind == "local":
        if precision != "float32":
            raise ConfigError(f"engine.precision = {precision}: the local engine trains in float32 only")
        return LocalEngine(module, ranks=ranks, optimizer=optimizer, total_steps=total_steps)
    values = run_values(
        config, optimizer, world_size=ranks.world_size, local_size=ranks.local_size, hidden_size=hidden_size
    )
    resolved = resolve(config.deepspeed, values)
    from rlhf.engine.zero import ZeroEngine  # importing DeepSpeed takes seconds: only where it is used

    return ZeroEngine(module, ranks=ranks, optimizer=optimizer, total_steps=total_steps, deepspeed_config=resolved)
