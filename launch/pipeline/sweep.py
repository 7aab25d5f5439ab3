"""Which runs a sweep consists of: axes, names, and configs that the stage's own parser has accepted."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from policy.preference.config import PreferenceConfig
from policy.preference.losses import LOSSES
from rlhf.config import load_config, to_yaml
from rlhf.core.errors import ConfigError
from rlhf.core.files import digest

PROGRAM = "rlhf sweep preference"
KIND = "loss.kind"
LONGEST_NAME = 80
NAMES_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    settings: Mapping[str, str]
    """Its value on each axis."""
    folder: Path
    arguments: tuple[str, ...]
    """Of the stage."""
    config: PreferenceConfig

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def marker(self) -> Path:
        """Written when the run is finished, with :attr:`digest`."""
        return self.folder / "sweep_done.json"

    @property
    def digest(self) -> str:
        """Of all settings but the folder, so that a sweep that was moved is still finished."""
        return digest(to_yaml(replace(self.config, output=Path(self.name))))

    @property
    def is_done(self) -> bool:
        """Whether it finished with these very settings."""
        try:
            return self.evaluation.is_file() and json.loads(self.marker.read_text())["digest"] == self.digest
        except (OSError, ValueError, KeyError, TypeError):
            return False


def paired_objectives() -> list[str]:
    """What ``loss.kind=all`` stands for: no likelihood alone, and nothing that reads single responses."""
    return [name for name, objective in LOSSES.items() if name != "sft" and not objective.unpaired]


def plan_sweep(recipes: Sequence[Path], overrides: Sequence[str], folder: Path) -> list[SweepRun]:
    """All runs of a sweep; the first axis changes slowest.

    Args:
        recipes: of every run.
        overrides: of every run; those whose value is a comma list are the axes.
        folder: gets one folder for each run.
    Raises:
        ConfigError: naming the problems of all runs at once.
    """
    axes = _axes(overrides)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    names = run_names(points)
    runs: list[SweepRun] = []
    problems: dict[str, list[str]] = {}
    for name, point in zip(names, points, strict=True):
        where = f"output={_yaml_text(str(folder / name))}"
        changed = [_with_value(override, point) for override in overrides]
        try:
            config = load_config(PreferenceConfig, recipes, [*changed, where], program=PROGRAM)
            _check_comparable(config)
        except ConfigError as error:
            for line in _problems(error):
                problems.setdefault(line, []).append(name)
            continue
        files = itertools.chain.from_iterable(("--config", str(recipe)) for recipe in recipes)
        runs.append(
            SweepRun(
                name=name,
                settings=point,
                folder=folder / name,
                arguments=(*files, *changed, where),
                config=config,
            )
        )
    if problems:
        raise ConfigError(_refusal(problems, len(names)))
    return runs


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


def _axes(overrides: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key that takes several."""
    axes: dict[str, list[str]] = {}
    keys = [override.partition("=")[0] for override in overrides]
    if "output" in keys:
        raise ConfigError(f"{PROGRAM}: output=...: every run has its own; give the folder of them all as --output")
    for key, override in zip(keys, overrides, strict=True):
        values = _values(override)
        if len(values) > 1 and keys.count(key) > 1:
            raise ConfigError(f"{PROGRAM}: {key} is given twice; name all of its values in one comma list")
        if len(values) > 1:
            axes[key] = list(dict.fromkeys(values))
    if not axes:
        raise ConfigError(
            f"{PROGRAM}: nothing to compare: give at least one setting several values, such as {KIND}=sigmoid,ipo "
            f"or {KIND}=all"
        )
    return axes


def _values(override: str) -> list[str]:
    key, _, text = override.partition("=")
    parts = [part.strip() for part in split_values(text)]
    if key == KIND:
        kinds = [paired_objectives() if part == "all" else [part] for part in parts]
        parts = list(itertools.chain.from_iterable(kinds))
    if len(parts) > 1 and not all(parts):
        raise ConfigError(f"{PROGRAM}: {override}: a value between commas is missing")
    return parts


def _with_value(override: str, point: Mapping[str, str]) -> str:
    key = override.partition("=")[0]
    return f"{key}={point[key]}" if key in point else override


def _check_comparable(config: PreferenceConfig) -> None:
    if not config.rows.eval_sources and not config.rows.eval_share:
        raise ConfigError(f"{PROGRAM}:\n  data.eval is empty and data.eval_share = 0: nothing to compare the runs on")


def _problems(error: ConfigError) -> list[str]:
    return str(error).split("\n  ")[1:] or [str(error)]


def _refusal(problems: Mapping[str, Sequence[str]], runs: int) -> str:
    lines = []
    for problem, names in problems.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        where = f"all {runs} runs" if len(names) == runs else ", ".join(names[:NAMES_SHOWN]) + more
        lines.append(f"{problem}\n    in {where}")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n  ".join([f"{PROGRAM}: {count}, no run was started", *lines])


def _name(point: Mapping[str, str]) -> str:
    parts = [value if key == KIND else f"{key.rpartition('.')[2]}_{value}" for key, value in point.items()]
    plain = "-".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._+]+", "-", plain).strip("-.")[:LONGEST_NAME]
    return safe if safe == plain else f"{safe}-{_short_digest(point)}".lstrip("-")


def _short_digest(point: Mapping[str, str]) -> str:
    return digest(*itertools.chain.from_iterable(point.items()))[:6]


def _yaml_text(text: str) -> str:
    """``text`` as a value on the command line, in quotes where YAML could take it for something else."""
    return text if re.fullmatch(r"[A-Za-z0-9._/+~-]*", text) else json.dumps(text, ensure_ascii=False)
