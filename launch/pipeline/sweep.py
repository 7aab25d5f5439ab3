"""Which runs a sweep consists of: a pipeline with one entry for each combination of values."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.pipeline.state import kept_settings
from launch.runs import Pipeline, PipelineStage
from launch.stages import Stage, load
from rlhf.config import load_config
from rlhf.core.errors import ConfigError
from rlhf.core.files import digest
from rlhf.data.options import row_sections
from rlhf.train.comparison import Comparison

KIND = "loss.kind"
"""Names of runs have its value alone."""
LONGEST_NAME = 80
NAMES_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Runs of one stage that are compared."""

    stage: Stage
    pipeline: Pipeline
    """One entry for each run; none needs another."""
    points: Mapping[str, Mapping[str, str]]
    """The value of each run on each axis, by the name of the run."""


def comparison_of(stage: Stage) -> Comparison:
    return load(stage.comparison) if stage.comparison else Comparison()


def plan_remembering(
    stage: Stage, recipes: Sequence[Path], overrides: Sequence[str], folder: Path, *, forget: bool = False
) -> Sweep:
    """Sweep as :func:`plan_sweep` does; ``overrides`` without an axis are on top of those of the earlier one.

    Those with an axis are another sweep, of which nothing is remembered.

    Args:
        stage: as :func:`plan_sweep` takes it, and so are the others.
        recipes: the last one must be that of the earlier sweep.
        overrides: of this call; of a key that both name, this one counts.
        folder: of the sweep.
        forget: leave out what was given earlier.
    """
    has_axis = any(len(split_values(text.partition("=")[2])) > 1 or text.endswith("=all") for text in overrides)
    kept = [] if forget or has_axis else kept_settings(folder, recipes[-1], overrides)
    if not kept:
        return plan_sweep(stage, recipes, overrides, folder)
    try:
        sweep = plan_sweep(stage, recipes, [*kept, *overrides], folder)
    except ConfigError as error:
        raise ConfigError(f"{error}\n  with {' '.join(kept)} of an earlier call; --forget leaves that out") from None
    return replace(sweep, pipeline=replace(sweep.pipeline, remembered=tuple(kept)))


def plan_sweep(stage: Stage, recipes: Sequence[Path], overrides: Sequence[str], folder: Path) -> Sweep:
    """All runs of a sweep; the first axis changes slowest.

    Args:
        stage: of all runs.
        recipes: of every run.
        overrides: of every run; those whose value is a comma list are the axes.
        folder: gets one run folder for each run.
    Raises:
        ConfigError: naming the problems of all runs at once.
    """
    program = f"rlhf sweep {stage.name}"
    axes = _axes(overrides, comparison_of(stage).all_of, program)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    names = run_names(points)
    runs: list[PipelineStage] = []
    problems: dict[str, list[str]] = {}
    for name, point in zip(names, points, strict=True):
        changed = [_with_value(override, point) for override in overrides]
        place = {"output": str(folder / name)}
        try:
            config = load_config(stage.config_class(), recipes, changed, settings=place, program=program)
            _check_comparable(config, program)
        except ConfigError as error:
            for line in _problems(error):
                problems.setdefault(line, []).append(name)
            continue
        runs.append(PipelineStage(name=name, stage=stage, config=config))
    if problems:
        raise ConfigError(_refusal(problems, len(names), program))
    pipeline = Pipeline(
        name=f"sweep {stage.name}",
        output=folder,
        stages=tuple(runs),
        elsewhere="--output FOLDER",
        recipe=recipes[-1] if recipes else None,
        overrides=tuple(overrides),
    )
    return Sweep(stage=stage, pipeline=pipeline, points=dict(zip(names, points, strict=True)))


def split_values(text: str) -> list[str]:
    """``text`` cut at its commas outside of brackets, braces and quotes; whole if one of these stays open."""
    parts, start, depth = [], 0, 0
    quote, before = "", ","
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and before in ",[{(:'\"":  # elsewhere it is an apostrophe
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif char == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
        if not char.isspace():
            before = char
    return [text] if quote or depth else [*parts, text[start:]]


def run_names(points: Sequence[Mapping[str, str]]) -> list[str]:
    """A folder name for each run, from its values on the axes: it depends on them alone, not on the other runs."""
    names = [_name(point) for point in points]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name}-{_short_digest(point)}"
        for name, point in zip(names, points, strict=True)
    ]


def _axes(overrides: Sequence[str], all_of: Mapping[str, Sequence[str]], program: str) -> dict[str, list[str]]:
    """The values of each key that takes several."""
    axes: dict[str, list[str]] = {}
    keys = [override.partition("=")[0] for override in overrides]
    if "output" in keys:
        raise ConfigError(f"{program}: output=...: every run has its own; give the folder of them all as --output")
    for key, override in zip(keys, overrides, strict=True):
        values = _values(override, all_of, program)
        if len(values) > 1 and keys.count(key) > 1:
            raise ConfigError(f"{program}: {key} is given twice; name all of its values in one comma list")
        if len(values) > 1:
            axes[key] = list(dict.fromkeys(values))
    if not axes:
        raise ConfigError(
            f"{program}: nothing to compare: give at least one setting several values, such as "
            "optim.learning_rate=1e-5,1e-6" + "".join(f", or {key}=all" for key in all_of)
        )
    return axes


def _values(override: str, all_of: Mapping[str, Sequence[str]], program: str) -> list[str]:
    key, _, text = override.partition("=")
    parts: list[str] = []
    for part in (part.strip() for part in split_values(text)):
        parts += all_of[key] if part == "all" and key in all_of else [part]
    if len(parts) > 1 and not all(parts):
        raise ConfigError(f"{program}: {override}: a value between commas is missing")
    return parts


def _with_value(override: str, point: Mapping[str, str]) -> str:
    key = override.partition("=")[0]
    return f"{key}={point[key]}" if key in point else override


def _check_comparable(config: Any, program: str) -> None:
    rows = dict(row_sections(config))
    if rows and not any(section.eval_sources or section.eval_share for section in rows.values()):
        empty = ", ".join(f"{name}.eval is empty and {name}.eval_share = 0" for name in rows)
        raise ConfigError(f"{program}:\n  {empty}: nothing to compare the runs on")


def _problems(error: ConfigError) -> list[str]:
    return str(error).split("\n  ")[1:] or [str(error)]


def _refusal(problems: Mapping[str, Sequence[str]], runs: int, program: str) -> str:
    lines = []
    for problem, names in problems.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        where = f"all {runs} runs" if len(names) == runs else ", ".join(names[:NAMES_SHOWN]) + more
        lines.append(f"{problem}\n    in {where}")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n  ".join([f"{program}: {count}, no run was started", *lines])


def _name(point: Mapping[str, str]) -> str:
    parts = [value if key == KIND else f"{key.rpartition('.')[2]}_{value}" for key, value in point.items()]
    plain = "-".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._+]+", "-", plain).strip("-.")[:LONGEST_NAME]
    return safe if safe == plain else f"{safe}-{_short_digest(point)}".lstrip("-")


def _short_digest(point: Mapping[str, str]) -> str:
    return digest(*itertools.chain.from_iterable(point.items()))[:6]
