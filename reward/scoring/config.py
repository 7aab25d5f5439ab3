"""The recipe of scoring as a stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from rlhf.core.annotations import NoResult
from rlhf.data.options import ColumnConfig

SCORED = "scored.jsonl"
"""What it writes into its folder: the rows with what the model says of them beside their own columns."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What to score with what."""

    output: Annotated[Path, NoResult()]
    """Run folder, in which scored.jsonl is written: the rows with chosen_reward, rejected_reward and reward_margin."""
    model: str
    """The reward model: final/ of a run of the reward stage."""
    data: str
    """The rows: a file, folder, glob or hub name."""
    split: str | None = None
    """The split of a hub dataset or of a folder (train)."""
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    """Column names of the rows."""
    batch_tokens: Annotated[int, Gt(0), NoResult()] = 8192
    """Padded tokens at once."""
