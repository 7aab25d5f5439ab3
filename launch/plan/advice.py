"""What to change when a plan does not fit, found by planning again; and the least sharding that does fit."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launch.plan.cluster import Cluster
from launch.plan.planner import Request, StagePlan, plan_stage
from rlhf.core.errors import UserError
from rlhf.models.options import LoraOptions
from rlhf.models.roles import REPLICATED
from rlhf.train.workload import TrainingRecipe

ORDER = ("zero0", "zero1", "zero2", "zero3_hpz", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme")
"""Configurations of ds_configs from the least sharding to the most, offloading last: it costs the most time."""
ENGINE = "engine.deepspeed"
LEAST_TOKENS = 1024
"""Tokens below which a micro-batch is too small to keep a device busy."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """Settings to try together, by key of the recipe."""

    settings: Mapping[str, Any]

    @property
    def words(self) -> str:
        """The settings as a command line takes them."""
        return " ".join(f"{key}={_word(value)}" for key, value in self.settings.items())

    def turned(self, config: TrainingRecipe) -> TrainingRecipe | None:
        """``config`` with the settings; ``None`` if the recipe refuses them."""
        try:
            for key, value in self.settings.items():
                config = _changed(config, key, value)
        except ValueError:
            return None
        return config


def _word(value: Any) -> str:
    if isinstance(value, LoraOptions):
        return f"{{rank: {value.rank}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _changed(section: Any, key: str, value: Any) -> Any:
    name, _, below = key.partition(".")
    return replace(section, **{name: _changed(getattr(section, name), below, value) if below else value})


def smallest_config(plan: StagePlan, request: Request) -> str | None:
    """The first of :data:`ORDER` with which the stage fits; ``None`` if none does, or without DeepSpeed."""
    from rlhf.engine.deepspeed_config import shipped_names

    if plan.config.engine.kind == "local":
        return None
    there = set(shipped_names())
    for name in (each for each in ORDER if each in there):
        found = _again(plan, _engine_knob(plan, name), request)
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
        found = _again(plan, knob, request)
        if found is None:
            continue
        if found.fits:
            return f"{knob.words} (then it fits)"
        short = _shortage(found)
        if short < _shortage(plan) and (best is None or short < best[0]):
            best = short, knob.words
    return None if best is None else f"{best[1]} (nearer, but {best[0] / 2**30:.1f} GiB short still)"


def _again(plan: StagePlan, knob: Knob, request: Request) -> StagePlan | None:
    """``None`` for a combination that the stage or DeepSpeed refuses."""
    config = knob.turned(plan.config)
    if config is None:
        return None
    try:
        return plan_stage(plan.stage, config, plan.cluster, request)
    except UserError:
        return None


def _shortage(plan: StagePlan) -> int:
    return max(0, -plan.device_free) + max(0, -(plan.host_free or 0))


def _knobs(plan: StagePlan) -> Iterator[Knob]:
    """Those that cost the least first."""
    main, rollout = plan.roles.main.recipe, plan.workload.rollout
    if main.backbone.attention == "eager":
        yield Knob(settings={f"{main.section}.attention": "sdpa"})
    yield from _token_knobs(plan)
    if not main.backbone.gradient_checkpointing:
        sections = dict.fromkeys(role.recipe.section for role in plan.roles.trained)
        yield Knob(settings={f"{section}.gradient_checkpointing": True for section in sections})
    whole = [role.recipe for role in plan.roles.asked if role.loaded and role.recipe.placement == REPLICATED]
    for setting in dict.fromkeys(role.placed_by for role in whole):
        yield Knob(settings={setting: "zero3"})
    yield from _engine_knobs(plan)
    if rollout is not None and rollout.batch_rows > 8:
        yield Knob(settings={"rollout.batch_rows": rollout.batch_rows // 4})
    if plan.roles.main.model.trained == "full":
        unfrozen = {f"{main.section}.freeze_layers": 0} if main.backbone.freeze_layers else {}
        yield Knob(settings={f"{main.section}.lora": LoraOptions(), **unfrozen})


def _token_knobs(plan: StagePlan) -> Iterator[Knob]:
    longest = int(plan.lengths.values.sum(axis=1).max())
    if plan.workload.rollout is not None:
        longest += plan.workload.rollout.max_new_tokens
    tokens = plan.config.train.micro_batch_tokens // 2
    while tokens >= max(longest, LEAST_TOKENS):
        yield Knob(settings={"train.micro_batch_tokens": tokens})
        tokens //= 2


def _engine_knobs(plan: StagePlan) -> Iterator[Knob]:
    from rlhf.engine.deepspeed_config import shipped_names

    config, there = plan.config, set(shipped_names())
    if config.engine.kind == "local":
        return
    later = ORDER[ORDER.index(config.engine.deepspeed) + 1 :] if config.engine.deepspeed in ORDER else ORDER
    yield from (_engine_knob(plan, name) for name in later if name in there)


def _engine_knob(plan: StagePlan, name: str) -> Knob:
    """The configuration ``name`` for all that is trained."""
    own = {role.recipe.placed_by for role in plan.roles.trained} - {ENGINE}
    return Knob(settings={ENGINE: name} | {setting: None for setting in sorted(own)})


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
