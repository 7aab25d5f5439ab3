"""``held_out.jsonl``: what the held-out evaluation found of each item, in the run folder.

Every line has ``row`` (file and line of the data), ``group`` (equal for equal prompts), ``value`` (the mean of all
values, weighed by ``weight`` where there is one, is the stage's main number), and what the stage knows beside that.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.core.files import write_text

HELD_OUT = "held_out.jsonl"
LONGEST_TEXT = 4000
"""Characters of a text that are kept."""


def write_held_out(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file of ``folder``; the main rank calls it."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(folder / HELD_OUT, "".join(lines))


def shortened(text: str) -> str:
    """``text``, or its beginning where it is long."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ..."
