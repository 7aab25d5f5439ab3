"""``warnings.jsonl``: what the main rank of a run warned of, for those who look at the run later."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf.core.files import WARNINGS

OWN = ("rlhf", "reward", "policy", "launch")


class _WarningLog(logging.Handler):
    """Appends the warnings of our own packages to a file of the run folder."""

    def __init__(self, folder: Path, step: Callable[[], int]) -> None:
        super().__init__(logging.WARNING)
        self._path, self._step = folder / WARNINGS, step

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] not in OWN or not self._path.parent.is_dir():
            return
        row = {"time": record.created, "step": self._step(), "from": record.name, "text": record.getMessage()}
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as handle:  # the log has it, too
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def keeping_warnings(folder: Path, step: Callable[[], int]) -> Iterator[None]:
    """Keep what is warned of inside; ``step`` gives the step that the run has come to."""
    handler, root = _WarningLog(folder, step), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
