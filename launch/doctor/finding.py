"""What a check has to say."""

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Status
    """warning: a run may go on, with less than it could have. failure: it will not get far."""
    text: str
    remedy: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """Measured numbers, for programs."""
    check: str = ""
    """Name of the check that has found it, filled in for it."""
