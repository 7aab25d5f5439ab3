"""What to change when a plan does not fit, found by planning again; and the least sharding that does fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launch.plan.cluster import Cluster
from launch.plan.planner import Request, StagePlan, plan_stage
from rlhf.core.errors import UserError
from rlhf.models.options import LoraOptions

ORDER = ("zero0", "zero1", "zero2", "zero3_hpz", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme")
"""Configurations of ds_configs from the least sharding to the most, offloading last: it costs the most time."""
LEAST_TOKENS = 1024
"""Below this a micro-batch is too small to keep a device busy."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A setting to try."""

    setting: str
    config: Any


def smallest_config(plan: StagePlan, request: Request) -> str | None:
    """The first of :data:`ORDER` with which the stage fits; ``None`` if none does, or without DeepSpeed."""
    from rlhf.engine.deepspeed_config import shipped_names

    if plan.config.engine.kind == "local":
        return None
    there = set(shipped_names())
    for name in (each for each in ORDER if each in there):
        found = _again(plan, _with_engine(plan.config, name), request)
        if found is not None and found.fits:
            return name
    return None


def next_knob(plan: StagePlan, request: Request) -> str | None:
    """The first single setting with which the stage fits; else the one that brings it nearest.

    Returns:
        In words, with what comes of it; ``None`` if no setting helps, or none is needed.
    """
    if plan.fits:
        return None
    best: tuple[int, str] | None = None
    for knob in _knobs(plan):
        found = _again(plan, knob.config, request)
        if found is None:
            continue
        if found.fits:
            return f"{knob.setting} (then it fits)"
        short = _shortage(found)
        if short < _shortage(plan) and (best is None or short < best[0]):
            best = short, knob.setting
    return None if best is None else f"{best[1]} (nearer, but {best[0] / 2**30:.1f} GiB short still)"


def _again(plan: StagePlan, config: Any, request: Request) -> StagePlan | None:
    """``None`` for a combination that the stage or DeepSpeed refuses."""
    try:
        return plan_stage(plan.stage, config, plan.cluster, request)
    except UserError:
        return None


def _shortage(plan: StagePlan) -> int:
    return max(0, -plan.device_free) + max(0, -(plan.host_free or 0))


def _knobs(plan: StagePlan) -> Iterator[Knob]:
    """Those that cost the least first."""
    config = plan.config
    yield from _attention_knob(plan)
    yield from _token_knobs(plan)
    yield from _checkpointing_knob(plan)
    yield from _placement_knobs(plan)
    yield from _engine_knobs(plan)
    if plan.stage == "ppo" and config.rollout.batch_rows > 8:
        rows = config.rollout.batch_rows // 4
        changed = replace(config, rollout=replace(config.rollout, batch_rows=rows))
        yield Knob(setting=f"rollout.batch_rows={rows}", config=changed)
    if plan.roles.main.model.trained == "full":
        section = "policy" if plan.stage == "ppo" else "model"
        model = replace(getattr(config, section), lora=LoraOptions(), freeze_layers=0)
        try:
            changed = replace(config, **{section: model})
        except ValueError:
            return
        yield Knob(setting=f"{section}.lora={{rank: {model.lora.rank}}}", config=changed)


def _attention_knob(plan: StagePlan) -> Iterator[Knob]:
    section = "policy" if plan.stage == "ppo" else "model"
    model = getattr(plan.config, section)
    if model.attention == "eager":
        changed = replace(plan.config, **{section: replace(model, attention="sdpa")})
        yield Knob(setting=f"{section}.attention=sdpa", config=changed)


def _token_knobs(plan: StagePlan) -> Iterator[Knob]:
    train = plan.config.train
    longest = int(plan.lengths.values.sum(axis=1).max())
    if plan.stage == "ppo":
        longest += plan.config.rollout.max_new_tokens
    tokens = train.micro_batch_tokens // 2
    while tokens >= max(longest, LEAST_TOKENS):
        changed = replace(plan.config, train=replace(train, micro_batch_tokens=tokens))
        yield Knob(setting=f"train.micro_batch_tokens={tokens}", config=changed)
        tokens //= 2


def _checkpointing_knob(plan: StagePlan) -> Iterator[Knob]:
    section = "policy" if plan.stage == "ppo" else "model"
    config = plan.config
    model = getattr(config, section)
    if model.gradient_checkpointing:
        return
    changes: dict[str, Any] = {section: replace(model, gradient_checkpointing=True)}
    words = f"{section}.gradient_checkpointing=true"
    if plan.stage == "ppo" and config.advantage.needs_values:
        changes["critic"] = replace(config.critic, gradient_checkpointing=True)
        words += " critic.gradient_checkpointing=true"
    try:
        yield Knob(setting=words, config=replace(config, **changes))
    except ValueError:  # a shared trunk does not go with it
        return


def _placement_knobs(plan: StagePlan) -> Iterator[Knob]:
    config = plan.config
    for name in ("reference", "reward"):
        section = getattr(config, name, None)
        if getattr(section, "placement", None) == "replicated" and _takes_weights(plan, name):
            yield Knob(
                setting=f"{name}.placement=zero3", config=replace(config, **{name: replace(section, placement="zero3")})
            )


def _takes_weights(plan: StagePlan, name: str) -> bool:
    return any(role.name.startswith(name) and role.loaded for role in plan.roles.asked)


def _engine_knobs(plan: StagePlan) -> Iterator[Knob]:
    from rlhf.engine.deepspeed_config import shipped_names

    config, there = plan.config, set(shipped_names())
    if config.engine.kind == "local":
        return
    later = ORDER[ORDER.index(config.engine.deepspeed) + 1 :] if config.engine.deepspeed in ORDER else ORDER
    for name in (each for each in later if each in there):
        yield Knob(setting=f"engine.deepspeed={name}", config=_with_engine(config, name))


def _with_engine(config: Any, name: str) -> Any:
    changed = replace(config, engine=replace(config.engine, deepspeed=name))
    if getattr(getattr(config, "critic", None), "deepspeed", None) is not None:
        changed = replace(changed, critic=replace(changed.critic, deepspeed=None))
    return changed


def fewest_nodes(plan: StagePlan, request: Request, *, at_most: int = 64) -> int | None:
    """Nodes with which the stage fits as it is written, doubling; ``None`` if not even ``at_most`` do."""
    nodes = plan.cluster.nodes * 2
    while nodes <= at_most:
        found = _on(plan, replace(plan.cluster, nodes=nodes), request)
        if found is not None and found.fits:
            return nodes
        nodes *= 2
    return None


def _on(plan: StagePlan, cluster: Cluster, request: Request) -> StagePlan | None:
    try:
        return plan_stage(plan.stage, plan.config, cluster, request)
    except UserError:
        return None
