"""The completion marker of a run: ``done.json``, the last file that a finished run writes.

Exit codes prove less: a launcher can exit with 0 although its processes were killed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.config import to_dict
from rlhf.core.files import DONE as MARKER
from rlhf.core.files import digest, write_json


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a finished run says of itself."""

    stage: str
    """sft, reward, preference or ppo."""
    config: str
    """:func:`config_digest` of its recipe."""
    step: int
    """Optimizer steps (PPO: rollouts) that it was trained for."""
    seconds: float
    """How long its last process ran; earlier ones that stopped or were killed are not counted."""


def config_digest(config: Any) -> str:
    """A name for all settings of a recipe, defaults included, but for the folder that it writes to."""
    settings = to_dict(config)
    settings.pop("output", None)
    return digest(json.dumps(settings, sort_keys=True))


def write_completion(folder: Path, completion: Completion) -> None:
    write_json(folder / MARKER, asdict(completion))


def read_completion(folder: Path) -> Completion | None:
    """The marker of a run folder; ``None`` for a run that is not finished, or was begun again since."""
    try:
        return Completion(**json.loads((folder / MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove_completion(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)
