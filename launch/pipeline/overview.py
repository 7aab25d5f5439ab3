"""What a pipeline shows: a live table in a terminal, lines elsewhere, and a report at the end."""

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.pipeline.state import Action, Measured, Progress
from launch.runs import Pipeline, PipelineStage
from rlhf.core.clock import clock
from rlhf.train.status import Status, read_status

SECONDS_BETWEEN_LINES = 30.0
STYLES = {"finished": "green", "running": "bold cyan", "failed": "bold red", "stopped": "yellow"}


@dataclass
class Line:
    """One stage in the table."""

    kind: str
    state: str = ""
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Overview:
    """The stages of a pipeline, one line each. Use as a context manager."""

    pipeline: Pipeline
    console: Console
    lines: dict[str, Line] = field(default_factory=dict)
    _live: Live | None = None
    _printed: dict[str, tuple[float, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lines = {stage.name: Line(stage.stage.name) for stage in self.pipeline.stages}

    def __enter__(self) -> "Overview":
        if self.console.is_terminal:
            # Gone at the end: the report shows the table once more.
            self._live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, name: str, state: str, detail: str = "", seconds: float | None = None) -> None:
        """Set the line of a stage, and say so where the table does not show it."""
        line = self.lines[name]
        changed = (line.state, line.detail) != (state, detail)
        line.state, line.detail = state, detail
        if seconds is not None:
            line.seconds = seconds
        if changed and self._live is None:
            self.say(f"{name}: {state}" + (f"  {detail}" if detail else ""))

    def tick(self, name: str, status: Status | None, seconds: float) -> None:
        """What the running stage has come to; in a log file a line now and then."""
        line, progress = self.lines[name], status.where if status is not None else None
        line.detail, line.seconds = progress or line.detail, seconds
        now, (then, before) = time.monotonic(), self._printed.get(name, (0.0, ""))
        if self._live is None and progress and progress != before and now - then > SECONDS_BETWEEN_LINES:
            self._printed[name] = now, progress
            self.say(f"{name}: {progress}")

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def table(self) -> Table:
        table = Table(title=f"{self.pipeline.name}: {self.pipeline.output}", title_justify="left")
        for column in ("stage", "kind", "state", "time", "where it stands"):
            table.add_column(column, overflow="fold", no_wrap=column in ("state", "time"))
        for name, line in self.lines.items():
            took = clock(line.seconds) if line.seconds else ""
            state = Text(line.state, style=STYLES.get(line.state, ""))
            table.add_row(name, line.kind if line.kind != name else "", state, took, Text(line.detail))
        return table


def outcome(stage: PipelineStage, measured: Measured | None) -> str:
    """The key metrics of a finished stage."""
    metrics = {} if measured is None else {name: each for name, each in measured.metrics.items() if each is not None}
    return ", ".join(f"{name} {value:.4f}" for name, value in stage.stage.key_metrics(metrics).items())


def status_table(pipeline: Pipeline, progress: Progress) -> Table:
    """The table that a run would show, with what it would do.

    Raises:
        UserError: if a run would be refused, as a folder of its stages holds something else.
    """
    view = Overview(pipeline, Console(quiet=True))
    progress.check_free(pipeline.stages)
    for stage in pipeline.stages:
        marker = progress.read(stage) or {}
        state, detail = _standing(stage, progress)
        view.show(stage.name, state, detail, marker.get("seconds"))
    return view.table()


def _standing(stage: PipelineStage, progress: Progress) -> tuple[str, str]:
    decision = progress.decide(stage)
    if decision.action is Action.SKIP:
        return Action.SKIP.value, outcome(stage, progress.measured(stage))
    if decision.action is Action.CONTINUE:
        status = read_status(stage.output)
        if status is None:
            return decision.action.value, ""
        if status.state == "running" and not status.is_gone:
            return "running", status.where
        return decision.action.value, status.reason or status.where
    return decision.action.value, decision.reason
