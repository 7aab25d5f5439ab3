"""What the checks look at: the run that the machine is to be ready for, and what the plan says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from launch.runs import Pipeline, PipelineStage
from rlhf.core.files import is_in

if TYPE_CHECKING:
    from launch.plan.planner import StagePlan


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
    stages: tuple[PipelineStage, ...] = ()
    """What it still has to do."""
    together: tuple[tuple[PipelineStage, ...], ...] = ()
    """Groups of them that are likely to be at work at a time."""
    pipeline: Pipeline | None = None
    """All that the stages belong to; those that are done count as what others start from."""
    seconds: float = 180.0
    """How long the ranks may take to come up and meet."""

    @property
    def processes(self) -> int:
        from launch.jobs.devices import default_ranks

        return self.ranks or default_ranks()

    @property
    def trained(self) -> tuple[PipelineStage, ...]:
        """The stages that train."""
        return tuple(each for each in self.stages if each.stage.trains)

    @cached_property
    def plans(self) -> "tuple[tuple[PipelineStage, StagePlan | Exception], ...]":
        """What ``rlhf plan`` says of each stage that trains, on this machine; or why it says nothing."""
        from launch.plan.cluster import cluster_of
        from launch.plan.models import Sources
        from launch.plan.planner import Request, plan_stage

        # One for all stages: runs of a sweep have the same models.
        request = Request(sources=Sources(made={} if self.pipeline is None else self.pipeline.made))

        def plan(stage: PipelineStage) -> "StagePlan | Exception":
            try:
                nodes = len(stage.share(self.hosts)) if self.hosts else 1
                here = cluster_of(nodes=nodes, devices_per_node=self.world(stage)[1])
                return plan_stage(stage.stage.name, stage.config, here, request)
            except Exception as error:  # a model's own code may raise anything; other checks are still worth having
                return error

        return tuple((stage, plan(stage)) for stage in self.trained)

    @cached_property
    def planned(self) -> "tuple[tuple[PipelineStage, StagePlan], ...]":
        """Those of :attr:`plans` that there are."""
        return tuple((stage, plan) for stage, plan in self.plans if not isinstance(plan, Exception))

    @cached_property
    def planned_together(self) -> "tuple[tuple[tuple[PipelineStage, StagePlan], ...], ...]":
        """Those of :attr:`planned` that use this host at a time, one alone as well."""
        found = {stage.title: (stage, plan) for stage, plan in self.planned}
        groups = [tuple(found[each.title] for each in group if each.title in found) for group in self.together]
        return (*((each,) for each in self.planned), *(group for group in groups if not self.hosts and len(group) > 1))

    def world(self, stage: PipelineStage) -> tuple[int, int]:
        """Ranks of a stage in all, and on one node."""
        if self.hosts:
            mine = stage.share(self.hosts).values()
            return sum(mine), max(mine)
        ranks = stage.ranks or self.processes
        return ranks, ranks

    def will_make(self, path: str | Path) -> bool:
        """Whether a stage of the pipeline writes there: what is not there yet is not missing."""
        return self.pipeline is not None and any(is_in(Path(path), each.output) for each in self.pipeline.stages)
