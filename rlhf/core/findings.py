"""What a benchmark or a comparison leaves behind: its numbers in one file, and a line for each item in another."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.core.files import write_json, write_text

EVALUATION = "evaluation.json"
ITEMS = "items.jsonl"
KIND = "kind"
"""The field of evaluation.json that says what was compared: the last word of the stage's module."""


def write_findings(folder: Path, kind: str, found: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> None:
    """Write both files into ``folder``.

    Args:
        folder: made if it is not there.
        kind: see :data:`KIND`.
        found: numbers.
        items: rows, each with an ``id``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in items)
    write_text(folder / ITEMS, "".join(lines))
    write_json(folder / EVALUATION, {KIND: kind, **found})


def read_findings(folder: Path) -> dict[str, Any]:
    """What evaluation.json of ``folder`` holds."""
    found: dict[str, Any] = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    return found
