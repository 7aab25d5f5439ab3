"""What the checks look at: the run that the machine is to be ready for, and what the plan says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.stages import Stage, models_of
from rlhf.core.files import is_in

if TYPE_CHECKING:
    from launch.plan.models import Sources
    from launch.plan.planner import StagePlan
    from rlhf.models.options import BackboneConfig
    from rlhf.models.roles import ModelRole


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage that the machine is to be ready for."""

    stage: Stage
    config: Any
    """Its recipe."""
    name: str = ""
    """Name of the stage in a pipeline; empty for a recipe that stands alone."""
    ranks: int | None = None
    """Processes of this stage on one machine; ``None`` for those of the run."""

    @property
    def trains(self) -> bool:
        return self.stage.trains

    @property
    def title(self) -> str:
        return self.name or self.stage.name

    @property
    def models(self) -> "tuple[ModelRole, ...]":
        """Those that it loads."""
        return models_of(self.config)

    def setting(self, key: str) -> str:
        """``key`` as a command line has it: ``NAME.key`` in a pipeline."""
        return f"{self.name}.{key}" if self.name else key


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The run that the machine is to be ready for, as far as it is known."""

    ranks: int | None = None
    """Processes on this machine; ``None`` for as many as the launcher would start."""
    hostfile: Path | None = None
    hosts: Mapping[str, int] = field(default_factory=dict)
    """Devices by node, if there are several."""
    output: Path = Path("runs")
    """Where the run writes."""
    stages: tuple[PlannedStage, ...] = ()
    """What it still has to do, by its recipes."""
    made: "Mapping[str, BackboneConfig]" = field(default_factory=dict)
    """Folders of models that stages of the run leave behind, and what these start from."""
    published: tuple[Path, ...] = ()
    """All folders that stages of the run write to."""
    seconds: float = 180.0
    """How long the ranks may take to come up and meet."""

    @property
    def processes(self) -> int:
        from launch.jobs.devices import default_ranks

        return self.ranks or default_ranks()

    @property
    def trained(self) -> tuple[PlannedStage, ...]:
        """The stages that train."""
        return tuple(stage for stage in self.stages if stage.trains)

    @cached_property
    def plans(self) -> "tuple[tuple[PlannedStage, StagePlan | Exception], ...]":
        """What ``rlhf plan`` says of each stage that trains, on this machine; or why it says nothing."""
        return tuple((stage, self._plan(stage)) for stage in self.trained)

    @cached_property
    def planned(self) -> "tuple[tuple[PlannedStage, StagePlan], ...]":
        """Those of :attr:`plans` that there are."""
        return tuple((stage, plan) for stage, plan in self.plans if not isinstance(plan, Exception))

    @cached_property
    def _sources(self) -> "Sources":
        """One for all stages: runs of a sweep have the same models."""
        from launch.plan.models import Sources

        return Sources(made=self.made)

    def _plan(self, stage: PlannedStage) -> "StagePlan | Exception":
        from launch.plan.cluster import cluster_of
        from launch.plan.planner import Request, plan_stage

        _, ranks = self.world(stage)
        try:
            here = cluster_of(nodes=max(len(self.hosts), 1), devices_per_node=ranks)
            return plan_stage(stage.stage.name, stage.config, here, Request(sources=self._sources))
        except Exception as error:  # a model's own code may raise anything; the other checks are still worth having
            return error

    def world(self, stage: PlannedStage) -> tuple[int, int]:
        """Ranks of a stage in all, and on one node."""
        if self.hosts:
            return sum(self.hosts.values()), max(self.hosts.values())
        ranks = stage.ranks or self.processes
        return ranks, ranks

    def will_make(self, path: str | Path) -> bool:
        """Whether a stage of the run writes there: what is not there yet is not missing."""
        return any(is_in(Path(path), folder) for folder in self.published)
