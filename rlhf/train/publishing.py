"""What the stages share on the way to ``final/``: sample rows, and the fresh process that must reproduce them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.core.errors import ModelError
from rlhf.data.batching import ItemSource, Row, length_bucket
from rlhf.engine.api import Engine
from rlhf.engine.stop import sheltering_children
from rlhf.train.batches import asking

CASES = 12


def sample_rows(data: ItemSource) -> list[Row]:
    """Rows of very different lengths, whole items."""
    order = np.argsort(data.lengths.sum(axis=1), kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, CASES // data.lengths.shape[1]).astype(int))]
    return [row for index in chosen for row in data.item(int(index)).rows]


def live_outputs(engine: Engine, rows: Sequence[Row]) -> list[Any]:
    """What the model under training says about each row alone. Every rank must call it."""
    with asking(engine):
        return [engine.forward((length_bucket([row]).to(engine.ranks.device),)) for row in rows]


def readable_cases(rows: Sequence[Row], values: Tensor, tokenizer: Any) -> list[dict]:
    """Text, tokens, response mask and value of the rows that survive decoding and encoding again.

    Raises:
        ModelError: if none does.
    """
    cases = []
    for row, value in zip(rows, values.tolist(), strict=True):
        text, tokens = tokenizer.decode(row.tokens), row.tokens.tolist()
        if tokenizer(text, add_special_tokens=False)["input_ids"] == tokens:
            cases.append({"text": text, "tokens": tokens, "response": row.response.tolist(), "value": value})
    if not cases:
        raise ModelError("no sample row survives decoding and encoding again; the tokenizer is lossy")
    return cases


def check_in_fresh_process(module: str, folder: Path, request: dict) -> dict[str, float]:
    """Run ``python -m module folder request.json``; the differences that it reports.

    Raises:
        ModelError: if it does not reproduce the values of ``request``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request))
        command = [sys.executable, "-m", module, str(folder), str(path)]
        with sheltering_children():  # who asks the run to stop signals all its processes
            process = subprocess.Popen(
                command, text=True, env=_plain_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        said, complaint = process.communicate()
    report = said.strip().splitlines()[-1:] or [complaint[-2000:]]
    if process.returncode != 0:
        raise ModelError(
            f"the saved model does not reproduce the live values, so it is not published: {report[0]}; "
            "the checkpoints are intact"
        )
    return json.loads(report[0])


def check_low_precision(live: Tensor, expected: Tensor, tolerance: float) -> None:
    """Refuse weights whose values in the precision of training are far from those in float32.

    Raises:
        ModelError: if the largest difference passes ``tolerance``.
    """
    worst = float((live - expected).abs().max())
    if not worst <= tolerance:
        raise ModelError(
            f"values in training precision and in float32 differ by {worst:.3f}, more than {tolerance}; "
            "the model is not published, the checkpoints are intact"
        )


def _plain_environment() -> dict[str, str]:
    """Without what a launcher set: the fresh process is nobody's rank, and it reads files only."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "TORCHELASTIC_", "DS_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))
    return kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
