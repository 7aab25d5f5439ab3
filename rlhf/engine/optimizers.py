"""AdamW, its parameter groups and its learning-rate schedule."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from rlhf.core.heads import HEAD_NAMES
from rlhf.engine.options import OptimizerConfig

AdamFactory = Callable[..., Optimizer]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay; vectors (norms, biases) and the reward head do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # Under ZeRO-3 a partitioned parameter is flat here and carries its real shape as ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        is_head = any(f".{head}." in f".{name}." for head in HEAD_NAMES)
        (plain if len(shape) < 2 or is_head else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, factory: AdamFactory = torch.optim.AdamW, **options: Any
) -> Optimizer:
    return factory(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_epsilon,
        **options,
    )


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LRScheduler:
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    warmup = round(config.warmup_share * total_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def follow_schedule(schedule: LRScheduler) -> None:
    """Give the optimizer the rate that ``schedule`` has where it stands: a checkpoint has that of its own schedule."""
    assert isinstance(schedule, LambdaLR)
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def move_schedule(schedule: LRScheduler, steps: int) -> None:
    """Move ``schedule`` on to where it is after ``steps`` steps; never back."""
    with warnings.catch_warnings():
        # torch takes a schedule that moves before the first step of the optimizer for a mistake.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        while schedule.last_epoch < steps:
            schedule.step()
