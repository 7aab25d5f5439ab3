"""A stage at work: its job, its logs, and what it was asked."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from launch.jobs import log
from launch.jobs.launcher import Job
from launch.runs import PipelineStage
from rlhf.core.errors import STOP_FILE
from rlhf.train.status import Status

SECONDS_BETWEEN_REQUESTS = 5.0


@dataclass
class Started:
    """A stage that a pipeline has started."""

    stage: PipelineStage
    job: Job
    logs: "Logs"
    began: float = field(default_factory=time.monotonic)
    asked: float | None = None
    """When it was first asked to stop."""
    _again: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it has worked."""
        return time.monotonic() - self.began

    @property
    def saves(self) -> bool:
        """Whether it can be asked to save; one that does not train has nothing to save, and is ended."""
        return self.stage.stage.trains

    def ask(self) -> bool:
        """Ask it to save and stop, again and again: ranks that still start drop a file older than they are.

        Returns:
            whether this was the first time.
        """
        now, first = time.monotonic(), self.asked is None
        self.asked = now if self.asked is None else self.asked
        if self.saves and now >= self._again:
            self._again = now + SECONDS_BETWEEN_REQUESTS
            self.stage.output.mkdir(parents=True, exist_ok=True)
            (self.stage.output / STOP_FILE).touch()
        return first

    def is_late(self, grace_seconds: float) -> bool:
        """Whether it was asked, and its time to save is over."""
        return self.asked is not None and (not self.saves or time.monotonic() - self.asked > grace_seconds)


@dataclass(frozen=True)
class Logs:
    """The log files of a stage, and how long each was when it started."""

    folder: Path
    starts: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", {path: log.size(path) for path in self.folder.glob("*.log")})

    @property
    def launcher(self) -> Path:
        return self.folder / "launcher.log"

    def cause(self, status: Status | None) -> str:
        """Why the stage failed, and the log that tells more: by its status, else by what was said last."""
        if status is not None and status.state == "failed":
            of_rank = f"rank {status.rank}: " if status.rank else ""
            of_it = self.folder / f"rank{status.rank}.log"
            path = of_it if of_it.exists() else self.launcher  # it broke before it had one
            return f"{of_rank}{status.reason}\n  its log: {path}"
        there = [path for path in (self.folder / "rank0.log", self.launcher) if path.exists()]
        words = {path: log.last_line(path, self.starts.get(path, 0)) for path in there}
        path = next((path for path in there if words[path]), next(iter(there), self.launcher))
        return f"{words.get(path) or 'no output'}\n  its log: {path}"
