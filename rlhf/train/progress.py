"""One progress display, on the main rank: a live bar in a terminal, plain lines in a log file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rlhf.core.clock import clock
from rlhf.engine.ranks import Ranks
from rlhf.train.status import describe, report_metrics, report_progress, report_status

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Steps (or whatever ``what`` names) done, ETA, pairs/s and tokens/s."""

    def __init__(self, ranks: Ranks, total: int, start: int, what: str = "step") -> None:
        self._active, self._total, self._start, self._what = ranks.is_main, total, start, what
        self._console = Console(highlight=False)
        self._began = time.monotonic()
        self._printed = 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if self._active and self._console.is_terminal:
            self._bar = Bar(
                TextColumn(self._what),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=self._total, completed=self._start, metrics="")
            self._bar.start()
        self._began = time.monotonic()
        report_status(unit=self._what, step=self._start, total=self._total, eta_seconds=None)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        text, now = describe(metrics), time.monotonic()
        left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
        report_metrics(metrics, unit=self._what, step=step, total=self._total, eta_seconds=left)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=text)
            return
        if step == self._total or now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            self._console.print(f"{self._what} {step}/{self._total}  ETA {clock(left)}  {text}", soft_wrap=True)

    def phase(self, text: str) -> None:
        """What is going on inside a long step."""
        report_progress(phase=text)
        if self._bar is not None:
            self._bar.update(self._task, metrics=text)
            return
        now = time.monotonic()
        if self._active and now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            self._console.print(text, soft_wrap=True)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        report_metrics(metrics)
        shown = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in metrics.items())
        self.note(f"held-out at step {step}: {shown}")

    def note(self, text: str) -> None:
        if self._active:
            self._console.print(text, soft_wrap=True)
