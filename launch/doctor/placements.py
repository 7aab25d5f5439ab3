"""Every DeepSpeed configuration of a stage: of what it trains, the critic included, and of models that it only asks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from launch.doctor.finding import PlannedStage, Subject
from rlhf.core.errors import ConfigError

SOME_WIDTH = 1024
"""Of a model: what follows from it is no fault of a configuration."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A configuration, and what it is for."""

    setting: str
    """The key of the recipe."""
    source: str
    role: Literal["train", "frozen"]
    optimizer: Any = None
    """Of a model in training: its section."""


def placements(stage: PlannedStage) -> Iterator[Placement]:
    """Those that the stage would use, in the order of its recipe."""
    config = stage.config
    yield Placement(
        setting="engine.deepspeed", source=config.engine.deepspeed, role="train", optimizer=config.optim
    )
    if stage.kind == "ppo":
        yield from _of_ppo(config)
    elif stage.kind == "preference" and config.loss.needs_reference:
        is_adapter_off = config.reference.kind == "live" and config.model.lora is not None
        in_policy = config.reference.path is None and (config.reference.kind != "live" or is_adapter_off)
        if not in_policy:
            yield from _frozen("reference.placement", config.reference.placement)


def _of_ppo(config: Any) -> Iterator[Placement]:
    critic = config.critic
    if config.advantage.needs_values:
        setting = "critic.deepspeed" if critic.deepspeed else "engine.deepspeed"
        source = critic.deepspeed or config.engine.deepspeed
        yield Placement(setting=setting, source=source, role="train", optimizer=critic.optim)
    if config.reference.path is not None or config.policy.lora is None:
        yield from _frozen("reference.placement", config.reference.placement)
    for name, section in {"reward": config.reward, "watch.second": config.watch.second}.items():
        if section is not None and section.paths:
            yield from _frozen(f"{name}.placement", section.placement)


def _frozen(setting: str, placement: str) -> Iterator[Placement]:
    if placement != "replicated":
        yield Placement(setting=setting, source=placement, role="frozen")


def resolved(placement: Placement, stage: PlannedStage, subject: Subject) -> dict[str, Any]:
    """The JSON as the stage would resolve it, but for sizes that follow the model; empty for the local engine.

    Raises:
        ConfigError: if the stage would refuse it.
    """
    from rlhf.engine.build import frozen_settings, run_values
    from rlhf.engine.deepspeed_config import resolve

    config, source = stage.config, placement.source
    ranks, local = subject.world(stage)
    sizes = {"world_size": ranks, "local_size": local, "hidden_size": SOME_WIDTH}
    if placement.role == "frozen":
        return frozen_settings(config.engine, source, **sizes)
    if config.engine.kind == "local":
        return {}
    found = resolve(source, run_values(config.engine, placement.optimizer, **sizes))
    zero_stage = found.get("zero_optimization", {}).get("stage", 0)
    if zero_stage == 3 and source == config.engine.deepspeed and _shares_trunk(stage):
        raise ConfigError(f"{source}: critic.share_trunk does not go with ZeRO-3; take engine.deepspeed=zero2")
    return found


def _shares_trunk(stage: PlannedStage) -> bool:
    return stage.kind == "ppo" and stage.config.critic.share_trunk and stage.config.advantage.needs_values
