"""What is wrong with a DeepSpeed JSON, whatever the run: keys, types, sections, arithmetic, offload.

DeepSpeed drops "auto", passes over unknown top-level keys and takes a text for a number; so all of this is looked at
before it. Which keys there are, and what they take, is asked of the installed DeepSpeed. Every check yields problems,
one line each: the key, the value found, and the way out.
"""

import difflib
import functools
import inspect
import typing
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.engine.deepspeed_files import Role, shown

AUTO = "auto"
SECTIONS: dict[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
_READ_KEY_BY_KEY = ("activation_checkpointing", "aio", "checkpoint", "data_types")
"""Sections that DeepSpeed has no model of: it looks keys up, and passes over the others."""
_MISPLACED = {
    "optimizer": "optim.learning_rate, beta1, beta2, adam_epsilon and weight_decay of the recipe",
    "scheduler": "optim.schedule and optim.warmup_share of the recipe",
}
_NOT_USED = {
    "amp": "the recipe's engine.precision decides",
    "autotuning": "rlhf plan names the smallest configuration that fits",
    "curriculum_learning": "the run orders its own data",
    "data_efficiency": "the run orders its own data",
    "elasticity": "the recipe's train.global_batch_size holds for any number of ranks",
    "hybrid_engine": "rollouts have a generator of their own",
    "progressive_layer_drop": "models are trained with all their layers",
}
"""Features of DeepSpeed that would act behind the run's back, with what does their work here."""
_DEFAULTS = {"steps_per_print": 10}  # what DeepSpeed takes for a number, though its default is none
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def take_out_misplaced(config: dict[str, Any]) -> Iterator[str]:
    """Remove from ``config`` what has no place in the JSON of a run."""
    for key, instead in _MISPLACED.items():
        if config.pop(key, None) is not None:
            yield f"{key}: the run builds its own {key}; remove this section (instead: {instead})"
    for key, instead in _NOT_USED.items():
        section = config.pop(key, None)
        enabled = section.get("enabled", False) if isinstance(section, dict) else bool(section)
        if enabled not in (False, AUTO):
            yield f"{key}: not used here ({instead}); remove this section"
    for key in (*SECTIONS, "torch_autocast", *_READ_KEY_BY_KEY):
        if not isinstance(config.get(key, {}), dict):
            yield f"{key} = {shown(config.pop(key))}: expected a section"


def take_out_unknown(config: dict[str, Any]) -> Iterator[str]:
    """Remove unknown top-level keys from ``config``; yield them and those inside of sections."""
    known = looked_up()
    for key in [key for key in config if key not in known[""]]:
        yield f"{key} = {shown(config.pop(key))}: {_unknown(key, known[''])}"
    for key, model in SECTIONS.items():
        yield from _unknown_fields(config.get(key, {}), model, key)
    for section in _READ_KEY_BY_KEY:
        for key, value in config.get(section, {}).items():
            if known[section] and key not in known[section]:
                yield f"{section}.{key} = {shown(value)}: {_unknown(key, known[section])}"


def known_keys() -> typing.KeysView[str]:
    """The top-level keys that DeepSpeed looks up."""
    return looked_up()[""].keys()


@functools.cache
def looked_up() -> dict[str, dict[str, Any]]:
    """The keys that DeepSpeed looks up, with its default for each, by section ("" for the top level).

    It publishes no list of them, so its parser is watched.
    """
    found: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in _READ_KEY_BY_KEY}}

    class Watched(dict):
        section = ""

        def __contains__(self, key: object) -> bool:
            found[self.section].setdefault(str(key), None)
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            found[self.section].setdefault(key, None)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            if found[self.section].get(key) is None:
                found[self.section][key] = default
            return super().get(key, default)

        def keys(self) -> "Watched":  # type: ignore[override]  # for its "key in config.keys()"
            return self

    sections = {}
    for name in _READ_KEY_BY_KEY:
        sections[name] = Watched()
        sections[name].section = name
    DeepSpeedConfig(Watched(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1))
    DeepSpeedConfig(Watched(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, **sections))
    return found


def wrong_scalars(config: dict[str, Any], owned: Iterable[str]) -> Iterator[str]:
    """Values of another type than DeepSpeed's default, which it would take as they are.

    Args:
        config: the configuration.
        owned: keys that the run decides; those are compared with its values instead.
    """
    for section, defaults in looked_up().items():
        values = config.get(section, {}) if section else config
        for key, value in values.items():
            default = _DEFAULTS.get(key, defaults.get(key))
            wanted = None if value == AUTO or key in owned else _wanted_instead(value, default)
            if wanted is not None:
                yield f"{section}{'.' * bool(section)}{key} = {shown(value)}: expected {wanted}"


def _wanted_instead(value: Any, default: Any) -> str | None:
    """The type, in words, that ``default`` has and ``value`` has not; ``None`` if they agree, or nothing is known."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if isinstance(default, str):
        return None if isinstance(value, str | list) else "a text"
    return None


def wrong_batch(config: dict[str, Any], world_size: int | None) -> Iterator[str]:
    """DeepSpeed's own arithmetic: batch = micro-batch x accumulation steps x ranks (any number if ``None``)."""
    total, micro, steps = (config.get(key) for key in BATCH_KEYS)
    if not (_is_count(total) and _is_count(micro)):
        return
    per_rank = micro * steps if _is_count(steps) else micro
    product = f"{BATCH_KEYS[1]} {micro}" + (f" x {BATCH_KEYS[2]} {steps}" if _is_count(steps) else "")
    if total % per_rank:
        yield f"{BATCH_KEYS[0]} = {total}: no multiple of {product}; DeepSpeed would refuse it on any number of ranks"
    elif _is_count(steps) and world_size is not None and total != per_rank * world_size:
        yield f"{BATCH_KEYS[0]} = {total}: {product} x {world_size} ranks is {per_rank * world_size}"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def wrong_precision(config: dict[str, Any]) -> Iterator[str]:
    """Two half precisions that are switched on at once."""
    if all(config.get(key, {}).get("enabled") is True for key in ("bf16", "fp16")):
        yield 'bf16.enabled and fp16.enabled are both true: one precision at a time; set both to "auto"'


def wrong_partitioning(zero: dict[str, Any], world_size: int, role: Role) -> Iterator[str]:
    """Offload and secondary partitions that DeepSpeed would accept and then ignore, or stumble over as it starts."""
    for key, devices in (("offload_optimizer", {"cpu": (1, 2, 3), "nvme": (3,)}), ("offload_param", {})):
        yield from _wrong_offload(zero, key, devices or {"cpu": (3,), "nvme": (3,)})
    size = zero.get("zero_hpz_partition_size", 1)
    if not _is_count(size) or size == 1:
        return
    setting = f"zero_optimization.zero_hpz_partition_size = {size}"
    stage = zero.get("stage", 0)
    if stage not in (3, AUTO):
        yield f"{setting}: works at ZeRO stage 3, and the stage is {shown(stage)}"
    if role == "frozen":
        yield f"{setting}: DeepSpeed has it for models under training only; leave it out"
    if world_size > size and world_size % size:
        yield f'{setting}: does not divide the {world_size} ranks; use the ranks of a node, or "auto"'


def _wrong_offload(zero: dict[str, Any], key: str, devices: dict[str, tuple[int, ...]]) -> Iterator[str]:
    section, stage = zero.get(key), zero.get("stage", 0)
    if not isinstance(section, dict):
        return
    device = section.get("device", "none")
    if device not in devices:
        return
    setting = f"zero_optimization.{key}.device = {shown(device)}"
    if stage != AUTO and stage not in devices[device]:
        fitting = " or ".join(map(str, devices[device]))
        yield f"{setting}: works at ZeRO stage {fitting}, and the stage is {shown(stage)}"
    if device == "nvme" and not section.get("nvme_path"):
        yield f'{setting}: needs nvme_path beside it, a folder on that disk or "auto" (engine.nvme_path of the recipe)'


def wrong_sections(config: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed's own models of the sections refuse."""
    for key, model in SECTIONS.items():
        try:
            model(**config.get(key, {}))
        except ValidationError as error:
            yield from _validation_lines(error, (key,))


def refused_by_deepspeed(config: dict[str, Any]) -> Iterator[str]:
    """DeepSpeed's own verdict, on a copy without the batch size: it counts ranks, which may not be up yet."""
    try:
        DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})
    except ValidationError as error:
        yield from (f"refused by DeepSpeed: {line}" for line in _validation_lines(error, (error.title,)))
    except (DeepSpeedConfigError, AssertionError, AttributeError, TypeError, ValueError) as error:
        yield f"refused by DeepSpeed: {error}"


def _unknown_fields(section: dict[str, Any], model: type[DeepSpeedConfigModel], path: str) -> Iterator[str]:
    """Unknown and deprecated fields of one section and the sections inside it."""
    fields = {
        alias: field for name, field in model.model_fields.items() for alias in (name, field.alias or name)
    }
    for key, value in section.items():
        if key not in fields:
            yield f"{path}.{key} = {shown(value)}: {_unknown(key, fields)}"
            continue
        extra = fields[key].json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            successor = extra.get("new_param")
            way_out = f"use {successor}" if successor else "remove it"
            yield f"{path}.{key} = {shown(value)}: deprecated in DeepSpeed, {way_out}"
        inner = _model_inside(fields[key])
        if inner and isinstance(value, dict):
            yield from _unknown_fields(value, inner, f"{path}.{key}")


def _model_inside(field: FieldInfo) -> type[DeepSpeedConfigModel] | None:
    choices = typing.get_args(field.annotation) or (field.annotation,)
    models = [kind for kind in choices if inspect.isclass(kind) and issubclass(kind, DeepSpeedConfigModel)]
    return models[0] if models else None


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"unknown key (did you mean {near[0]}?)" if near else "unknown key; remove it"


def _validation_lines(error: ValidationError, parents: tuple[str, ...]) -> Iterator[str]:
    """One line a fault; unknown fields of our own sections were reported before, with the nearest known."""
    for details in error.errors(include_url=False):
        if details["type"] == "extra_forbidden" and parents[0] in SECTIONS:
            continue
        path = ".".join(map(str, (*parents, *details["loc"])))
        across_fields = details["type"] in ("assertion_error", "value_error")
        found = "" if across_fields else f" = {shown(details['input'])}"
        yield f"{path}{found}: {details['msg']}"
