"""``margins.jsonl``: the margins of some pairs of some steps, each beside the reward gap and likeness of its pair."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from rlhf.engine.ranks import Ranks
from rlhf.train.metrics import drop_rows_after

MARGINS = "margins.jsonl"
STEPS, PAIRS = 100, 32
"""Most steps of a run, and most pairs of each, that are written, evenly spread: the file stays small."""


class MarginLog:
    """Writes on the main rank; every rank must call it."""

    def __init__(self, folder: Path, ranks: Ranks, total_steps: int) -> None:
        self._path, self._ranks = folder / MARGINS, ranks
        self._last, self._every = total_steps, max(1, -(-total_steps // STEPS))
        self._begun = False

    def wants(self, step: int) -> bool:
        """Whether ``step`` (from 1) is one of those that are written."""
        return step % self._every == 0 or step in (1, self._last)

    def write(self, step: int, columns: dict[str, Tensor]) -> None:
        """A line with ``(N,)`` columns of all pairs of ``step``; rows of a killed run are dropped first."""
        self._ranks.on_main(lambda: self._write(step, columns))

    def _write(self, step: int, columns: dict[str, Tensor]) -> None:
        if not self._begun:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            drop_rows_after(self._path, step - 1)
        self._begun = True
        line: dict[str, object] = {"step": step}
        for name, values in columns.items():
            places = np.unique(np.linspace(0, len(values) - 1, PAIRS).astype(int))
            line[name] = [float(f"{value:.5g}") for value in values.double().cpu().numpy()[places]]
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
