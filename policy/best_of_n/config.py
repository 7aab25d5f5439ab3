"""The recipe of best-of-n: ``python -m policy.best_of_n --config RECIPE.yaml``. Known without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rlhf.core.annotations import NoResult


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig:
    """Samples of a policy, the reward that chooses among them, and the one that judges the choice."""

    output: Annotated[Path, NoResult()]
    """Folder for evaluation.json, items.jsonl and best_of_n.svg."""
    responses: Path
    """responses.jsonl of rlhf generate, with several samples to a prompt."""
    proxy: str
    """The reward that chooses: the folder of a reward model, the address of a server of one, or module:function."""
    gold: str
    """The reward that judges, given alike."""
