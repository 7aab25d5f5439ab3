"""What a check looks at, and what it has to say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.stages import STAGES
from rlhf.core.files import is_in

if TYPE_CHECKING:
    from launch.plan.models import Sources
    from rlhf.models.options import BackboneConfig

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    status: Literal["ok", "warning", "failure"]
    """warning: a run may go on, with less than it could have. failure: it will not get far."""
    text: str
    remedy: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """Measured numbers, for programs."""


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage that the machine is to be ready for."""

    kind: str
    """The name of a stage."""
    config: Any
    """Its recipe."""
    name: str = ""
    """In a pipeline; empty for a recipe that stands alone."""
    ranks: int | None = None
    """Processes of this stage on one machine; ``None`` for those of the run."""

    @property
    def trains(self) -> bool:
        return STAGES[self.kind].trains

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
    made: Mapping[str, "BackboneConfig"] = field(default_factory=dict)
    """Folders of models that stages of the run leave behind, and what these start from."""
    published: tuple[Path, ...] = ()
    """All folders that stages of the run write to."""
    seconds: float = 180.0
    """How long the ranks may take to come up and meet."""

    @property
    def processes(self) -> int:
        from launch.jobs.launcher import default_ranks

        return self.ranks or default_ranks()

    @property
    def trained(self) -> tuple[PlannedStage, ...]:
        """The stages that train."""
        return tuple(stage for stage in self.stages if stage.trains)

    @cached_property
    def sources(self) -> "Sources":
        """Where the plan finds models that are not on disk yet."""
        from launch.plan.models import Sources

        return Sources(made=self.made)

    def world(self, stage: PlannedStage) -> tuple[int, int]:
        """Ranks of a stage in all, and on one node."""
        if self.hosts:
            return sum(self.hosts.values()), max(self.hosts.values())
        ranks = stage.ranks or self.processes
        return ranks, ranks

    def will_make(self, path: str | Path) -> bool:
        """Whether a stage of the run writes there: what is not there yet is not missing."""
        return any(is_in(Path(path), folder) for folder in self.published)


def gibibytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
