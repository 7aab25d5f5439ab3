"""Metrics of a run: ``metrics.jsonl`` always, and whatever else shows them."""

import contextlib
import json
import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rlhf.core.files import write_bytes
from rlhf.engine.ranks import Ranks
from rlhf.train.options import TrainConfig
from rlhf.train.trackers import TrackedRun, Trackers

log = logging.getLogger(__name__)


class MetricLog:
    """Writes on the main rank only; where it cannot, all ranks raise, so every rank must call all of it.

    Rows past ``resume_step`` (of a killed run) are dropped first; at -1, all are.
    """

    def __init__(self, folder: Path, ranks: Ranks, config: TrainConfig, *, recipe: str, resume_step: int) -> None:
        """``recipe``: all settings of the run, in YAML, for those who show them beside the metrics."""
        self._folder, self._config, self._ranks = folder, config, ranks
        self._run = TrackedRun(folder=folder, recipe=recipe, step=resume_step)
        self._open = contextlib.ExitStack()
        self._file: TextIO | None = None
        self._trackers: Trackers | None = None

    def __enter__(self) -> "MetricLog":
        self._ranks.on_main(self._begin)
        return self

    def _begin(self) -> None:
        path = self._folder / "metrics.jsonl"
        drop_rows_after(path, self._run.step)
        self._file = self._open.enter_context(path.open("a", encoding="utf-8"))
        self._trackers = self._open.enter_context(Trackers(self._config, self._run))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._ranks.together(lambda: self._write(step, metrics))

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self._file is None:
            return
        # JSON knows no NaN: a value that is not finite is written as null.
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._trackers is not None:
            self._trackers.write(step, metrics)


class SkipLog:
    """Names the rows of steps that were skipped because they were not finite."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._path, self._ranks = folder / "skipped.jsonl", ranks

    def record(self, step: int, bad_rows: list[str], rows: list[str], what: str = "loss") -> None:
        """Every rank must call it. Rows whose ``what`` is not finite if there are any, else all rows of the step."""
        found = self._ranks.gather_objects((bad_rows, rows))
        guilty = [row for part, _ in found for row in part]
        named = guilty or [row for _, part in found for row in part]
        what = what if guilty else "gradient norm"
        self._ranks.on_main(lambda: self._write({"step": step, "not_finite": what, "rows": named}))
        if not self._ranks.is_main:
            return
        shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        log.warning("step %d skipped on all ranks: %s not finite; rows: %s", step, what, shown)

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite a file of JSON lines without those of a later step than ``step``, and without a last one cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # a text in it may hold other ends of lines
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed run may be cut short, within a character too
            continue
        if row["step"] <= step:
            kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))
