"""What a study says: variants of one stage, each with several seeds, as a pipeline with an entry for each run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Gt, MinLen
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.pipeline.recipe import from_here, one_line
from launch.runs import Pipeline, PipelineStage
from launch.stages import STAGES, Stage, training
from rlhf.config import flat, load_config, read_tree, validate
from rlhf.core.errors import ConfigError
from rlhf.core.paths import beside, recipe_path
from rlhf.data.options import row_sections

PROGRAM = "rlhf study"
VALUE = "value"
"""The number of a held-out item that the stage's main number is the mean of."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study."""

    output: Path
    """Folder of the study; every run has its run folder in it."""
    stage: str
    """The stage of all runs, one that trains."""
    recipe: tuple[str, ...] = ()
    """Recipes of that stage; later ones win. shipped:NAME is one that is installed with the program."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs, on top of them."""
    variants: Annotated[dict[str, dict[str, Any]], MinLen(2)]
    """What is compared: settings by the name of the variant."""
    baseline: str | None = None
    """The variant that the others are compared with; the first one if left out."""
    seeds: Annotated[tuple[int, ...], MinLen(1)] = (0, 1, 2)
    """Every variant is trained once with each of them."""
    seed_settings: tuple[str, ...] = ("train.seed",)
    """Settings that a seed goes into."""
    value: str = VALUE
    """What counts of each held-out item: a number of held_out.jsonl, such as second for the second scorer of PPO; value
    is what the stage's main number is the mean of. Of others a verdict says higher or lower, not better or worse."""
    smallest: Annotated[float, Gt(0)] = 0.01
    """The smallest difference that would matter: where nothing is decided, the study says what would show it."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs of several variants, ready to be started."""

    config: StudyConfig
    stage: Stage
    pipeline: Pipeline
    runs: dict[tuple[str, int], PipelineStage]
    """Each run by its variant and seed."""

    @property
    def baseline(self) -> str:
        return self.config.baseline or next(iter(self.config.variants))


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study; every run is checked by its stage's own parser.

    Args:
        path: the YAML. Paths in it that begin with ./ or ../ start in its folder, and so do names of recipes.
        overrides: ``key=value`` for the study itself, such as seeds=[0,1].
    Raises:
        ConfigError: naming the problems of all runs at once.
    """
    config = validate(StudyConfig, study_tree(path, overrides), program=PROGRAM, origin=str(path))
    if config.stage not in training():
        raise ConfigError(f"{PROGRAM}: {path}: stage = {config.stage}: expected one of {', '.join(training())}")
    if config.baseline is not None and config.baseline not in config.variants:
        known = ", ".join(config.variants)
        raise ConfigError(f"{PROGRAM}: {path}: baseline = {config.baseline}: no such variant; there are {known}")
    doubled = sorted({seed for seed in config.seeds if config.seeds.count(seed) > 1})
    if doubled:
        raise ConfigError(f"{PROGRAM}: {path}: seeds has {doubled[0]} twice: the same run again is no evidence")
    stage, runs = STAGES[config.stage], {}
    problems: dict[str, list[str]] = {}
    for variant, own in config.variants.items():
        if not _NAME.fullmatch(variant):
            raise ConfigError(f"{PROGRAM}: {path}: variants.{variant}: expected a name of letters, digits, _, . and -")
        for seed in config.seeds:
            name = f"{variant}-seed{seed}"
            settings = _flat(config.set) | _flat(own) | dict.fromkeys(config.seed_settings, seed)
            place = {"output": str(config.output / name)}
            recipes = [recipe_path(text) for text in config.recipe]
            try:
                made = load_config(stage.config_class(), recipes, (), settings=settings | place, program=name)
            except ConfigError as error:
                for line in str(error).split("\n  ")[1:] or [str(error)]:
                    problems.setdefault(line, []).append(name)
                continue
            _check_held_out(made)
            runs[variant, seed] = PipelineStage(name=name, stage=stage, config=made)
    if problems:
        lines = [f"{line}\n    in {', '.join(names)}" for line, names in problems.items()]
        raise ConfigError("\n  ".join([f"{PROGRAM}: {path}: no run was started", *lines]))
    pipeline = Pipeline(
        name=path.stem,
        output=config.output,
        stages=tuple(runs.values()),
        elsewhere="output=FOLDER",
        recipe=path,
        overrides=tuple(overrides),
    )
    return Study(config=config, stage=stage, pipeline=pipeline, runs=runs)


def study_tree(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The YAML of a study with overrides, its paths beside it resolved; not yet checked.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        tree: Any = OmegaConf.to_container(read_tree(path), resolve=True)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{PROGRAM}: {path}: {one_line(error)}") from None
    if isinstance(tree.get("recipe"), str):
        tree["recipe"] = [tree["recipe"]]
    if isinstance(tree.get("recipe"), list):
        tree["recipe"] = [from_here(each) for each in tree["recipe"]]
    merged = OmegaConf.create(beside(tree, path.parent))
    for override in overrides:
        key, mark, _ = override.partition("=")
        if not mark or not key:
            raise ConfigError(f"{PROGRAM}: {override}: expected key=value, such as seeds=[0,1]")
        try:
            merged.merge_with_dotlist([override])
        except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{PROGRAM}: {override}: {one_line(error)}") from None
    return OmegaConf.to_container(merged)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return flat(settings) if settings else {}


def _check_held_out(config: Any) -> None:
    rows = dict(row_sections(config))
    if rows and not any(section.eval_sources or section.eval_share for section in rows.values()):
        empty = ", ".join(f"{name}.eval is empty and {name}.eval_share = 0" for name in rows)
        raise ConfigError(f"{PROGRAM}: {empty}: nothing to compare the runs on")
