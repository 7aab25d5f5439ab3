"""A run in one small file: what it was told, what it was made with, what it measured, and some of what it wrote."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from launch.capsule.comparing import comparable
from launch.pipeline.fingerprint import code_digest
from launch.report.reading import Run, read_runs
from launch.stages import Stage, by_program
from rlhf.core.errors import ConfigError, UserError
from rlhf.core.files import write_json

FORMAT = 1
FIRST_ROWS, MOST_ROWS, SAMPLES = 100, 500, 8


@dataclass(frozen=True, kw_only=True)
class Capsule:
    """What :func:`capsule_of` keeps of a run."""

    stage: str
    """The name that status.json has for it."""
    recipe: dict[str, Any]
    """All settings."""
    ranks: int
    environment: dict[str, Any]
    data: dict[str, Any]
    """Fingerprints of what it read, and what was said of it."""
    inputs: dict[str, str]
    """Digests of files and models, where a pipeline knows them."""
    code: dict[str, str]
    """Digests of the packages as they were when the run started; of runs that did not say, as they are now."""
    metrics: list[dict[str, Any]]
    """All of the first steps, and evenly spread ones of the others."""
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    format: int = FORMAT


def capsule_of(folder: Path) -> Capsule:
    """Put the run of ``folder`` into a capsule.

    Raises:
        UserError: if it is not the folder of one stage that trains and has taken a step.
    """
    runs = read_runs([folder])
    if len(runs) != 1 or runs[0].folder != folder:
        named = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"{folder}: {len(runs)} runs; a capsule holds one stage: give one of {named}")
    (run,) = runs
    stage = by_program(run.stage)
    if stage is None or not run.recipe or not run.metrics:
        raise UserError(f"{folder}: a {run.stage} run without steps or settings: there is nothing to make again")
    then = run.environment.get("code", {})
    rows = [*run.held_out, *run.rows("rollouts.jsonl")]
    return Capsule(
        stage=run.stage,
        recipe=yaml.safe_load(run.recipe),
        ranks=len(run.environment.get("ranks", ())) or 1,
        environment=dict(run.environment),
        data=dict(run.data),
        inputs=dict(run.inputs),
        code={package: then.get(package) or code_digest(package) for package in stage.code},
        metrics=_kept(run),
        evaluation=dict(run.evaluation),
        samples=[dict(row) for row in rows if "prompt" in row][:SAMPLES],
    )


def _kept(run: Run) -> list[dict[str, Any]]:
    rows = comparable(run.metrics)
    rest = rows[FIRST_ROWS:]
    every = -(-len(rest) // (MOST_ROWS - FIRST_ROWS)) or 1
    spread = [row for place, row in enumerate(rest) if place % every == 0 or place == len(rest) - 1]
    return rows[:FIRST_ROWS] + spread


def write_capsule(path: Path, capsule: Capsule) -> None:
    write_json(path, asdict(capsule))


def read_capsule(path: Path) -> Capsule:
    """The capsule in a file.

    Raises:
        ConfigError: if it is none.
    """
    try:
        capsule = TypeAdapter(Capsule).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a file that rlhf capsule wrote") from None
    except (ValueError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: no capsule ({reason}); expected a file that rlhf capsule wrote") from None
    if capsule.format != FORMAT:
        raise ConfigError(f"{path}: format = {capsule.format}: this version reads capsules of format {FORMAT}")
    return capsule


def stage_of(capsule: Capsule) -> Stage:
    """Its stage.

    Raises:
        ConfigError: if this version has none of that name.
    """
    stage = by_program(capsule.stage)
    if stage is None:
        raise ConfigError(f"capsule: stage = {capsule.stage}: this version has no such stage")
    return stage


def changes_since(capsule: Capsule, environment: Mapping[str, Any], data: Mapping[str, Any]) -> Sequence[str]:
    """What is not as it was, in words: versions, ranks, code, data."""
    found = []
    then, now = capsule.environment.get("packages", {}), environment.get("packages", {})
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            found.append(f"{name} was {then.get(name)} and is {now.get(name)}")
    devices = [[rank["device"] for rank in each.get("ranks", ())] for each in (capsule.environment, environment)]
    if devices[0] != devices[1]:
        found.append(f"ranks were {', '.join(devices[0])} and are {', '.join(devices[1])}")
    found += [f"the code of {name} changed" for name, was in capsule.code.items() if code_digest(name) != was]
    for part in ("train", "eval"):
        was, is_now = (each.get(part, {}).get("fingerprint") for each in (capsule.data, data))
        if was != is_now:
            found.append(f"data.{part} is another one: {was} then, {is_now} now")
    return found
