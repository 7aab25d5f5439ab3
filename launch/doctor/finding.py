"""What a check looks at, and what it has to say."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
class Subject:
    """The run that the machine is to be ready for, as far as it is known."""

    ranks: int | None = None
    """Processes on this machine; ``None`` for as many as the launcher would start."""
    hostfile: Path | None = None
    output: Path = Path("runs")
    """Where the run writes."""
    configs: tuple[Any, ...] = ()
    """Recipes of its stages."""
    seconds: float = 180.0
    """How long the ranks may take to come up and meet."""

    @property
    def processes(self) -> int:
        from launch.launcher import default_ranks

        return self.ranks or default_ranks()


def gibibytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
