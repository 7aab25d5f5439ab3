"""The DeepSpeed JSON of a run: every "auto" resolved, and nothing in it that contradicts the run.

DeepSpeed itself does not know "auto" (it drops the key and takes its own default) and passes over unknown
top-level keys, so both are settled here. What keys there are is asked of the installed DeepSpeed.
"""

import copy
import difflib
import functools
import importlib.resources
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, dict_raise_error_on_duplicate_keys
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.core.errors import ConfigError

AUTO = "auto"
_SECTIONS: dict[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
_KEPT_AUTO = {"data_types.keep_in_fp32_modules"}  # the one "auto" with a meaning of its own in DeepSpeed
_OWN_BOUNDARY = "micro-batches are packed by tokens, and the run decides after which one it updates"


@dataclass(frozen=True, kw_only=True)
class RunValues:
    """What the run decides and DeepSpeed has to be told."""

    precision: Literal["float32", "bfloat16", "float16"]
    gradient_clipping: float
    """Largest global gradient norm; 0 for no clipping."""
    world_size: int
    hidden_size: int | None = None
    """Width of the model: sizes the ZeRO-3 buckets that the JSON leaves at "auto"."""


Role = Literal["train", "frozen"]


def resolve(
    source: Path | str | Mapping[str, Any], run: RunValues, role: Role = "train"
) -> dict[str, Any]:
    """The complete configuration for ``deepspeed.initialize``, ready to be saved as JSON.

    Args:
        source: a JSON file, its contents, or the short name of a shipped one ("zero2": train_zero2.json).
        run: fills every "auto"; a value in ``source`` that differs from it is refused.
        role: which of the shipped ones a short name means: for training, or for models that are only asked.
    Raises:
        ConfigError: naming the file and every problem in it, one a line.
    """
    name, config = _read(source, role)
    problems = [*_drop_misplaced(config), *_drop_unknown(config)]
    problems += _settle_with_run(config, run)
    problems += _fill_auto(config, run)
    problems += _check_offload(config.get("zero_optimization", {}))
    problems += _check_sections(config)
    if not problems:
        problems += _check_by_deepspeed(config)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{name}: {count}", *problems]))
    return config


def shipped_names(role: Role = "train") -> list[str]:
    """Short names of the configurations that come with the toolkit."""
    names = [entry.name for entry in importlib.resources.files("ds_configs").iterdir()]
    mine = [name.removeprefix(f"{role}_") for name in names if name.startswith(f"{role}_") and name.endswith(".json")]
    return sorted(name.removesuffix(".json") for name in mine)


def _read(source: Path | str | Mapping[str, Any], role: Role) -> tuple[str, dict[str, Any]]:
    """Name for messages, and a copy of the contents that may be changed."""
    if isinstance(source, Mapping):
        return "DeepSpeed configuration", copy.deepcopy(dict(source))
    is_short_name = isinstance(source, str) and "/" not in source and not source.endswith(".json")
    if is_short_name and source not in shipped_names(role):
        known = ", ".join(shipped_names(role))
        raise ConfigError(
            f"{source}: no such DeepSpeed configuration (shipped: {known}; or give a path to a JSON)"
        )
    if is_short_name:
        path: Any = importlib.resources.files("ds_configs") / f"{role}_{source}.json"
        name = f"ds_configs/{path.name}"
    else:
        path, name = Path(source), str(source)
    try:
        config = json.loads(path.read_text("utf-8"), object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{name}: invalid JSON at {where}: {error.msg}") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: expected a JSON object, found {_shown(config)}")
    return name, config


def _drop_misplaced(config: dict[str, Any]) -> Iterator[str]:
    """Take out what has no place in the JSON of a run."""
    for key in ("optimizer", "scheduler"):
        if config.pop(key, None) is not None:
            yield f"{key}: the run builds its own {key}; remove this section"
    for key in (*_SECTIONS, "torch_autocast"):
        if not isinstance(config.get(key, {}), dict):
            yield f"{key} = {_shown(config.pop(key))}: expected a section"


def _drop_unknown(config: dict[str, Any]) -> Iterator[str]:
    for key in [key for key in config if key not in _known_keys()]:
        yield f"{key} = {_shown(config.pop(key))}: {_unknown(key, _known_keys())}"
    for key, model in _SECTIONS.items():
        yield from _unknown_fields(config.get(key, {}), model, key)


@functools.cache
def _known_keys() -> frozenset[str]:
    """The top-level keys that DeepSpeed looks up. It publishes no list of them, so its parser is watched."""
    looked_up: set[str] = set()

    class Watched(dict):
        def __contains__(self, key: object) -> bool:
            looked_up.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            looked_up.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            looked_up.add(key)
            return super().get(key, default)

        def keys(self) -> "Watched":  # type: ignore[override]  # for its "key in config.keys()"
            return self

    DeepSpeedConfig(Watched(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1))
    return frozenset(looked_up)


def _unknown_fields(section: dict[str, Any], model: type[DeepSpeedConfigModel], path: str) -> Iterator[str]:
    """Unknown and deprecated fields of one section and the sections inside it."""
    fields = {
        alias: field for name, field in model.model_fields.items() for alias in (name, field.alias or name)
    }
    for key, value in section.items():
        if key not in fields:
            yield f"{path}.{key} = {_shown(value)}: {_unknown(key, fields)}"
            continue
        extra = fields[key].json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            yield f"{path}.{key} = {_shown(value)}: deprecated in DeepSpeed, use {extra['new_param']}"
        inner = _model_inside(fields[key])
        if inner and isinstance(value, dict):
            yield from _unknown_fields(value, inner, f"{path}.{key}")


def _model_inside(field: FieldInfo) -> type[DeepSpeedConfigModel] | None:
    choices = typing.get_args(field.annotation) or (field.annotation,)
    models = [kind for kind in choices if inspect.isclass(kind) and issubclass(kind, DeepSpeedConfigModel)]
    return models[0] if models else None


def _unknown(key: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"unknown key (did you mean {near[0]}?)" if near else "unknown key"


def _owned_by_run(run: RunValues) -> dict[str, tuple[Any, str]]:
    """Value and reason of all that the run decides, by dotted key."""
    precision = f"the run's precision is {run.precision}"
    own_optimizer = "the run passes an optimizer of its own"
    return {
        "train_batch_size": (run.world_size, f"one row a rank for DeepSpeed: {_OWN_BOUNDARY}"),
        "train_micro_batch_size_per_gpu": (1, _OWN_BOUNDARY),
        "gradient_accumulation_steps": (1, _OWN_BOUNDARY),
        "managed_gradient_accumulation": (True, "the run sets the accumulation boundary through DeepSpeed"),
        "gradient_clipping": (run.gradient_clipping, "the run's largest gradient norm"),
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
        if path.split(".")[0] not in _known_keys():
            continue  # this release of DeepSpeed does not have it
        section = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, config)
        found = section.get(key, AUTO)
        if found != AUTO and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            yield f'{path} = {_shown(found)}: expected {_shown(value)} or "auto" ({reason})'
        section[key] = value


def _fill_auto(config: dict[str, Any], run: RunValues) -> Iterator[str]:
    """Replace the remaining "auto"; yield those that nothing in the run can replace."""
    if "log_level" in _known_keys():
        config.setdefault("log_level", "warning")
    config.setdefault("steps_per_print", AUTO)
    values: dict[str, Any] = {"steps_per_print": 1_000_000_000, "log_level": "warning"}
    widths = {
        "reduce_bucket_size": 2,
        "stage3_prefetch_bucket_size": 2,
        "stage3_param_persistence_threshold": 1,
    }
    if run.hidden_size is not None:
        square = run.hidden_size**2
        sizes = (square, square * 9 // 10, run.hidden_size * 10)
        values |= {f"zero_optimization.{key}": size for key, size in zip(widths, sizes, strict=True)}
    for path, section, key in list(_autos(config, "")):
        if path in values:
            section[key] = values[path]
        elif path.removeprefix("zero_optimization.") in widths:
            yield f'{path} = "auto": the hidden size of the model is not known; give a number'
        elif path not in _KEPT_AUTO:
            yield f'{path} = "auto": nothing in the run decides this; give a value or leave it out'


def _autos(node: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, container and key of every "auto" in ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, str) and value == AUTO:
            yield where, node, key
        else:
            yield from _autos(value, where)


def _check_offload(zero: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed would accept and then ignore, or stumble over in the middle of its start."""
    stage = zero.get("stage", 0)
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        section = zero.get(key)
        device = section.get("device", "none") if isinstance(section, dict) else "none"
        if device not in ("cpu", "nvme"):
            continue
        setting = f"zero_optimization.{key}.device = {_shown(device)}"
        if stage != AUTO and stage not in stages:
            fitting = " or ".join(map(str, stages))
            yield f"{setting}: works at ZeRO stage {fitting}, and the stage is {_shown(stage)}"
        if device == "nvme" and not section.get("nvme_path"):
            yield f"{setting}: needs nvme_path beside it, a folder on that disk"


def _check_sections(config: dict[str, Any]) -> Iterator[str]:
    for key, model in _SECTIONS.items():
        try:
            model(**config.get(key, {}))
        except ValidationError as error:
            yield from _validation_lines(error, (key,))


def _check_by_deepspeed(config: dict[str, Any]) -> Iterator[str]:
    """DeepSpeed's own verdict, on a copy without the batch size: it counts ranks, which may not be up yet."""
    try:
        DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})
    except ValidationError as error:
        yield from (f"refused by DeepSpeed: {line}" for line in _validation_lines(error, (error.title,)))
    except (DeepSpeedConfigError, AssertionError, AttributeError, TypeError, ValueError) as error:
        yield f"refused by DeepSpeed: {error}"


def _validation_lines(error: ValidationError, parents: tuple[str, ...]) -> Iterator[str]:
    """One line a fault; unknown fields of our own sections were reported before, with the nearest known."""
    for details in error.errors(include_url=False):
        if details["type"] == "extra_forbidden" and parents[0] in _SECTIONS:
            continue
        path = ".".join(map(str, (*parents, *details["loc"])))
        across_fields = details["type"] in ("assertion_error", "value_error")
        found = "" if across_fields else f" = {_shown(details['input'])}"
        yield f"{path}{found}: {details['msg']}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
