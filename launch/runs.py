"""Stages with their recipes, ready to be started: one alone, or those of a pipeline in the order in which they run."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.stages import Stage
from rlhf.config import to_yaml
from rlhf.core.errors import ConfigError
from rlhf.core.files import OWNER, RECIPE, write_text
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import ModelRole, published_role

NOTES = ".pipeline"
"""Folder in that of a pipeline: its owner, and what it knows of its stages, each by its name."""
INPUTS, OVERRIDES = "inputs.json", "overrides.json"
"""Files there that are about no stage."""
NO_NAMES = frozenset(name.removesuffix(".json") for name in (INPUTS, OVERRIDES, OWNER))
"""What no stage can be called."""


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """A stage, ready to be started."""

    name: str = ""
    """Its name in a pipeline; empty for a recipe that stands alone."""
    stage: Stage
    config: Any
    """Its resolved recipe, accepted by the stage's own parser."""
    needs: tuple[str, ...] = ()
    """Names of the stages that must be finished before."""
    nodes: int | None = None
    """Nodes that it uses; ``None`` for all of the run, or one if a single process does its work."""
    ranks: int | None = None
    """Its processes on each node; ``None`` for one on each device there."""
    time: str | None = None
    """Time limit of its job on a cluster, where it has one of its own; ``None`` for that of the profile."""

    @property
    def says_size(self) -> bool:
        """Whether its recipe says how much of the run's nodes and devices it uses."""
        return self.nodes is not None or self.ranks is not None

    @property
    def title(self) -> str:
        return self.name or self.stage.name

    @property
    def output(self) -> Path:
        return self.config.output

    @property
    def final(self) -> Path:
        """What other stages use."""
        return self.output / self.stage.published

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """Those that its recipe lists; none for a stage whose recipe lists none."""
        return getattr(self.config, "models", ())

    @property
    def recipe(self) -> Path:
        """The file that the stage is started with: its resolved recipe, in its run folder."""
        return self.output / RECIPE

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of the command that starts the stage."""
        return "--config", str(self.recipe)

    def share(self, hosts: Mapping[str, int]) -> dict[str, int]:
        """Its ranks by node, of ``hosts`` with their devices: it begins with the first.

        Raises:
            ConfigError: if it asks for more than there is.
        """
        nodes = self.nodes or (1 if self.stage.alone else len(hosts))
        if nodes > len(hosts):
            raise ConfigError(f"stages.{self.name}.nodes = {nodes}: the run has {len(hosts)}; ask for no more")
        mine = dict(itertools.islice(hosts.items(), nodes))
        short = {host: count for host, count in mine.items() if self.ranks is not None and self.ranks > count}
        for host, count in short.items():
            raise ConfigError(f"stages.{self.name}.ranks = {self.ranks}: {host} has {count} devices; ask for no more")
        return mine if self.ranks is None else dict.fromkeys(mine, self.ranks)

    def write_recipe(self) -> None:
        """Put the recipe where :attr:`arguments` say that it is."""
        write_text(self.recipe, to_yaml(self.config))

    def setting(self, key: str) -> str:
        """``key`` as a command line has it: ``NAME.key`` in a pipeline."""
        return f"{self.name}.{key}" if self.name else key


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages in the order in which they run."""

    name: str
    output: Path
    stages: tuple[PipelineStage, ...]
    elsewhere: str = "{stage}.output=FOLDER"
    """What to add to the command for another folder of a stage."""
    recipe: Path | None = None
    """The file that it was read from, if it was."""
    overrides: tuple[str, ...] = ()
    """Settings on top of the recipe."""
    remembered: tuple[str, ...] = ()
    """Those of them that an earlier call gave."""

    @property
    def made(self) -> Mapping[str, BackboneConfig]:
        """Where the models start that stages publish, by folder: their shapes are known before they are there."""
        published = ((stage.final, published_role(stage.models)) for stage in self.stages)
        return {str(folder): role.backbone for folder, role in published if role is not None}

    def named(self, name: str) -> PipelineStage:
        """The stage of this name.

        Raises:
            ConfigError: if there is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"pipeline: no stage {name}; there are {', '.join(each.name for each in self.stages)}")

    def upstream(self, stage: PipelineStage) -> list[PipelineStage]:
        return [self.named(name) for name in stage.needs]


def stage_logs(pipeline: Path, stage: str) -> Path:
    """Where a stage of the pipeline in this folder logs, and has its hostfile if it uses a part of the nodes."""
    return pipeline / "logs" / stage


def put_aside_names(folder: Path) -> Iterator[Path]:
    """Where a run may be kept that is done again in ``folder``: NAME.before, NAME.before-2 and so on."""
    yield folder.with_name(f"{folder.name}.before")
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}.before-{number}")


def put_aside_from(path: Path) -> Path | None:
    """The folder whose earlier run is kept at ``path``, by its name; ``None`` if that is no such name."""
    found = re.fullmatch(r"(.+)\.before(-\d+)?", path.name)
    return None if found is None else path.with_name(found[1])
