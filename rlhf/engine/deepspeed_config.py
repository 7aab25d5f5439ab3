"""The DeepSpeed JSON of a run: every "auto" resolved, and nothing in it that contradicts the run.

DeepSpeed itself does not know "auto" (it drops the key and takes its own default) and passes over unknown
top-level keys, so both are settled here.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.core.errors import ConfigError
from rlhf.engine import deepspeed_checks as checks
from rlhf.engine.deepspeed_checks import AUTO, BATCH_KEYS
from rlhf.engine.deepspeed_files import Role, Source, read, role_of, shipped_names, shown
from rlhf.engine.options import Precision

__all__ = ["Lint", "Role", "RunValues", "lint", "resolve", "role_of", "shipped_names", "zero_stage"]

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
_KEPT_AUTO = {"data_types.keep_in_fp32_modules"}  # the one "auto" with a meaning of its own in DeepSpeed
_OWN_BOUNDARY = "micro-batches are packed by tokens, and the run decides after which one it updates"
_NVME_PATHS = tuple(f"zero_optimization.offload_{what}.nvme_path" for what in ("optimizer", "param"))
_SOME_WIDTH = 1024  # any: only a real run's JSON is used


@dataclass(frozen=True, kw_only=True)
class RunValues:
    """What the run decides and DeepSpeed has to be told."""

    precision: Precision
    gradient_clipping: float
    """Largest global gradient norm; 0 for no clipping."""
    world_size: int
    local_size: int | None = None
    """Ranks of one node; ``None`` if all are on one."""
    hidden_size: int | None = None
    """Width of the model: sizes the ZeRO-3 buckets that the JSON leaves at "auto"."""
    nvme_path: str | None = None
    """Folder on a local disk for states that are offloaded there."""


@dataclass(frozen=True, kw_only=True)
class Lint:
    """What is to be said of a configuration without a run at hand."""

    name: str
    problems: tuple[str, ...]
    """What no run could accept, each with the way out."""
    conditions: tuple[str, ...]
    """What a recipe has to say to go with the fixed values."""
    config: dict[str, Any]
    """The configuration, resolved for some run that fits."""


def resolve(source: Source, run: RunValues, role: Role = "train") -> dict[str, Any]:
    """The complete configuration for ``deepspeed.initialize``, ready to be saved as JSON.

    Args:
        source: a JSON file, its contents, or the short name of a shipped one ("zero2": train_zero2.json).
        run: fills every "auto"; a value in ``source`` that differs from it is refused.
        role: which of the shipped ones a short name means: for training, or for models that are only asked.
    Raises:
        ConfigError: naming the file and every problem in it, one a line.
    """
    name, config, problems = read(source, role)
    problems += _resolve(config, run, role)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{name}: {count}", *problems]))
    return config


def zero_stage(source: Source, role: Role = "train") -> int:
    """The ZeRO stage of a configuration that :func:`resolve` accepts."""
    _, config, _ = read(source, role)
    found = _at(config, "zero_optimization.stage")
    return found if isinstance(found, int) else 0


def lint(source: Source, role: Role = "train") -> Lint:
    """Look at a configuration without a run: it is resolved for one that agrees with its fixed values.

    Raises:
        ConfigError: if the file cannot be read or is no JSON object.
    """
    name, config, problems = read(source, role)
    problems += _take_out_batch(config)
    run, conditions = _fitting_run(config)
    problems += _resolve(config, run, role)
    return Lint(name=name, problems=tuple(problems), conditions=tuple(conditions), config=config)


def _resolve(config: dict[str, Any], run: RunValues, role: Role) -> list[str]:
    """Resolve ``config`` in place; the problems."""
    problems = [*checks.take_out_misplaced(config), *checks.take_out_unknown(config)]
    problems += checks.wrong_batch(config, run.world_size)
    problems += checks.wrong_precision(config)
    problems += _settle_with_run(config, run)
    problems += _fill_auto(config, run)
    _without_its_clock(config)
    problems += checks.wrong_scalars(config, {path.split(".")[0] for path in _owned_by_run(run)})
    problems += checks.wrong_partitioning(config.get("zero_optimization", {}), run.world_size, role)
    problems += checks.wrong_sections(config)
    if not problems:
        problems += checks.refused_by_deepspeed(config)
    return problems


def _take_out_batch(config: dict[str, Any]) -> Iterator[str]:
    """The batch size of a JSON whose micro-batches say that it counts rows, not ranks."""
    yield from checks.wrong_batch(config, None)
    total, *parts = (config.get(key, AUTO) for key in BATCH_KEYS)
    if total != AUTO and any(part not in (1, AUTO) for part in parts):
        del config[BATCH_KEYS[0]]
        yield f'{BATCH_KEYS[0]} = {shown(total)}: expected "auto" (the recipe has train.global_batch_size)'


def _fitting_run(config: dict[str, Any]) -> tuple[RunValues, list[str]]:
    """The run that the fixed values of ``config`` ask for, and what a recipe must say to be that one."""
    conditions = []
    precisions = [each for each in PRECISIONS if _allows(config, each)]
    if 0 < len(precisions) < len(PRECISIONS):
        conditions.append(f"engine.precision={' or '.join(precisions)}")
    clipping = config.get("gradient_clipping", AUTO)
    if isinstance(clipping, int | float) and not isinstance(clipping, bool):
        conditions.append(f"optim.max_grad_norm={clipping}")
    ranks = config.get(BATCH_KEYS[0], AUTO)
    if ranks != AUTO:
        conditions.append(f"{shown(ranks)} rank(s)")
    zero = config.get("zero_optimization")
    part = zero.get("zero_hpz_partition_size", 1) if isinstance(zero, dict) else 1
    if isinstance(part, int) and part > 1:
        conditions.append(f"{part} rank(s) a node")
    if any(_at(config, path) == AUTO for path in _NVME_PATHS):
        conditions.append("engine.nvme_path=FOLDER")
    sizes = [size for size in (ranks, part) if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    run = RunValues(
        precision=precisions[0] if precisions else "bfloat16",
        gradient_clipping=clipping if isinstance(clipping, int | float) else 1.0,
        world_size=sizes[0] if sizes else 1,
        hidden_size=_SOME_WIDTH,
        nvme_path="/nvme",
    )
    return run, conditions


def _allows(config: dict[str, Any], precision: Precision) -> bool:
    wanted = {"bf16.enabled": precision == "bfloat16", "fp16.enabled": precision == "float16"}
    return all(_at(config, path) in (AUTO, None, value) for path, value in wanted.items())


def _at(config: Any, path: str) -> Any:
    """The value at a dotted path; ``None`` if there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _owned_by_run(run: RunValues) -> dict[str, tuple[Any, str]]:
    """Value and reason of all that the run decides, by dotted key."""
    precision = f"the run's precision is {run.precision}"
    own_optimizer = "the run passes an optimizer of its own"
    batch, micro, steps = BATCH_KEYS
    return {
        batch: (run.world_size, f"one row a rank for DeepSpeed: {_OWN_BOUNDARY}; set train.global_batch_size instead"),
        micro: (1, f"{_OWN_BOUNDARY}; set train.micro_batch_tokens instead"),
        steps: (1, _OWN_BOUNDARY),
        "managed_gradient_accumulation": (True, "the run sets the accumulation boundary through DeepSpeed"),
        "gradient_clipping": (run.gradient_clipping, "the run's largest gradient norm, optim.max_grad_norm"),
        "gradient_allreduce_op": ("mean", "the run scales its loss for a mean over ranks"),
        "bf16.enabled": (run.precision == "bfloat16", precision),
        "fp16.enabled": (run.precision == "float16", precision),
        "torch_autocast.enabled": (False, precision),
        "zero_allow_untested_optimizer": (True, own_optimizer),
        "zero_force_ds_cpu_optimizer": (False, own_optimizer),
    }


def _settle_with_run(config: dict[str, Any], run: RunValues) -> Iterator[str]:
    """Write the values of the run into ``config``; yield those that say otherwise."""
    for path, (value, reason) in _owned_by_run(run).items():
        *parents, key = path.split(".")
        if path.split(".")[0] not in checks.known_keys():
            continue  # this release of DeepSpeed does not have it
        section = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, config)
        found = section.get(key, AUTO)
        if found != AUTO and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            yield f'{path} = {shown(found)}: expected {shown(value)} or "auto" ({reason})'
        section[key] = value


def _fill_auto(config: dict[str, Any], run: RunValues) -> Iterator[str]:
    """Replace the remaining "auto"; yield those that nothing in the run can replace."""
    if "log_level" in checks.known_keys():
        config.setdefault("log_level", "warning")
    config.setdefault("steps_per_print", AUTO)
    values: dict[str, Any] = {"steps_per_print": 1_000_000_000, "log_level": "warning"}
    values["zero_optimization.zero_hpz_partition_size"] = run.local_size or run.world_size
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", AUTO)
    values["data_types.grad_accum_dtype"] = "fp32" if _adds_up_in_float32(config, run) else None
    missing = dict.fromkeys(_bucket_sizes(1), "the hidden size of the model is not known; give a number")
    if run.hidden_size is not None:
        values |= _bucket_sizes(run.hidden_size)
    missing |= dict.fromkeys(_NVME_PATHS, "set engine.nvme_path in the recipe to a folder on a local disk")
    if run.nvme_path is not None:
        values |= dict.fromkeys(_NVME_PATHS, run.nvme_path)
    for path, section, key in list(_autos(config, "")):
        if path in values:
            section[key] = values[path]
        elif path not in _KEPT_AUTO:
            reason = missing.get(path, "nothing in the run decides this; give a value or leave it out")
            yield f'{path} = "auto": {reason}'


def _without_its_clock(config: dict[str, Any]) -> None:
    """Have DeepSpeed measure no samples a second, unless asked to: it waits for the device in each forward pass."""
    timers = config.get("timers", {})
    if isinstance(timers, dict):
        config["timers"] = {"throughput": {"enabled": False}} | timers


def _adds_up_in_float32(config: dict[str, Any], run: RunValues) -> bool:
    """Whether gradients of micro-batches are added up in float32, not in the precision of the weights.

    In bfloat16 alone: 256 micro-batches of it are 2 % off. DeepSpeed cannot do so without ZeRO, takes another optimizer
    for ZeRO-1, and for ZeRO-2 with an offloaded optimizer would keep the sum on the device.
    """
    zero = config.get("zero_optimization", {})
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    stage = zero.get("stage", 0)
    return run.precision == "bfloat16" and (stage == 3 or (stage == 2 and not offloaded))


def _bucket_sizes(width: int) -> dict[str, int]:
    """Elements of ZeRO-3's buckets and of the parameters it keeps whole, as the Transformers Trainer sizes them."""
    return {
        "zero_optimization.reduce_bucket_size": width**2,
        "zero_optimization.stage3_prefetch_bucket_size": width**2 * 9 // 10,
        "zero_optimization.stage3_param_persistence_threshold": width * 10,
    }


def _autos(node: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, container and key of every "auto" in ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, str) and value == AUTO:
            yield where, node, key
        else:
            yield from _autos(value, where)
