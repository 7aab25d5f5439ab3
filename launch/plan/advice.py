"""What to change when a plan does not fit, found by planning again; and the least sharding that does fit."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from launch.plan.planner import StagePlan, worked_out
from rlhf.core.errors import UserError
from rlhf.models.options import LoraOptions
from rlhf.models.roles import REPLICATED

ORDER = ("zero0", "zero1", "zero2", "zero3_hpz", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme")
"""Configurations of ds_configs from the least sharding to the most, offloading last: it costs the most time."""
ENGINE = "engine.deepspeed"
LEAST_TOKENS = 1024
"""Tokens below which a micro-batch is too small to keep a device busy."""

Knob = Mapping[str, Any]
"""Settings to try together, by key of the recipe."""


def smallest_config(plan: StagePlan) -> str | None:
    """The first of :data:`ORDER` with which the stage fits; ``None`` if none does, or without DeepSpeed."""
    for name in _configurations(plan):
        found = _turned(plan, _engine_knob(plan, name))
        if found is not None and found.fits:
            return name
    return None


def next_knob(plan: StagePlan) -> str | None:
    """The first single setting with which the stage fits; else the one that brings it nearest.

    Returns:
        In words, with what comes of it; ``None`` if no setting helps, or none is needed.
    """
    if plan.fits:
        return None
    nearest, best = _shortage(plan), ""
    for knob in _knobs(plan):
        found = _turned(plan, knob)
        if found is None:
            continue
        words = " ".join(f"{key}={_word(value)}" for key, value in knob.items())
        if found.fits:
            return f"{words} (then it fits)"
        if _shortage(found) < nearest:
            nearest, best = _shortage(found), words
    return f"{best} (nearer, but {nearest / 2**30:.1f} GiB short still)" if best else None


def fewest_nodes(plan: StagePlan, *, at_most: int = 64) -> int | None:
    """Nodes with which the stage fits as it is written, doubling; ``None`` if not even ``at_most`` do."""
    nodes = plan.cluster.nodes * 2
    while nodes <= at_most:
        found = _tried(plan, cluster=replace(plan.cluster, nodes=nodes))
        if found is not None and found.fits:
            return nodes
        nodes *= 2
    return None


def _turned(plan: StagePlan, knob: Knob) -> StagePlan | None:
    """The plan with other settings; ``None`` for a combination that recipe, stage or DeepSpeed refuse."""
    config = plan.config
    try:
        for key, value in knob.items():
            config = _changed(config, key, value)
    except ValueError:
        return None
    return _tried(plan, config=config)


def _tried(plan: StagePlan, **changes: Any) -> StagePlan | None:
    try:
        return worked_out(replace(plan, **changes))
    except UserError:
        return None


def _changed(section: Any, key: str, value: Any) -> Any:
    name, _, below = key.partition(".")
    return replace(section, **{name: _changed(getattr(section, name), below, value) if below else value})


def _word(value: Any) -> str:
    """A value as a command line takes it."""
    if isinstance(value, LoraOptions):
        return f"{{rank: {value.rank}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _shortage(plan: StagePlan) -> int:
    return max(0, -plan.device_free) + max(0, -(plan.host_free or 0))


def _knobs(plan: StagePlan) -> Iterator[Knob]:
    """Those that cost the least first."""
    main, rollout = plan.roles.main.recipe, plan.workload.rollout
    if main.backbone.attention == "eager":
        yield {f"{main.section}.attention": "sdpa"}
    yield from _token_knobs(plan)
    if not main.backbone.gradient_checkpointing:
        sections = dict.fromkeys(role.recipe.section for role in plan.roles.trained)
        yield {f"{section}.gradient_checkpointing": True for section in sections}
    whole = [role.recipe for role in plan.roles.asked if role.loaded and role.recipe.placement == REPLICATED]
    for setting in dict.fromkeys(role.placed_by for role in whole):
        yield {setting: "zero3"}
    names, present = _configurations(plan), plan.config.engine.deepspeed
    later = names[names.index(present) + 1 :] if present in names else names
    yield from (_engine_knob(plan, name) for name in later)
    if rollout is not None and rollout.batch_rows > 8:
        yield {"rollout.batch_rows": rollout.batch_rows // 4}
    if plan.roles.main.model.trained == "full":
        unfrozen = {f"{main.section}.freeze_layers": 0} if main.backbone.freeze_layers else {}
        yield {f"{main.section}.lora": LoraOptions(), **unfrozen}


def _token_knobs(plan: StagePlan) -> Iterator[Knob]:
    longest = int(plan.lengths.values.sum(axis=1).max())
    if plan.workload.rollout is not None:
        longest += plan.workload.rollout.max_new_tokens
    tokens = plan.config.train.micro_batch_tokens // 2
    while tokens >= max(longest, LEAST_TOKENS):
        yield {"train.micro_batch_tokens": tokens}
        tokens //= 2


def _configurations(plan: StagePlan) -> list[str]:
    """Those of :data:`ORDER` that ship, if the run has DeepSpeed at all."""
    from rlhf.engine.deepspeed_config import shipped_names

    there = set(shipped_names())
    return [] if plan.config.engine.kind == "local" else [name for name in ORDER if name in there]


def _engine_knob(plan: StagePlan, name: str) -> Knob:
    """The configuration ``name`` for all that is trained."""
    own = {role.recipe.placed_by for role in plan.roles.trained} - {ENGINE}
    return {ENGINE: name} | {setting: None for setting in sorted(own)}
