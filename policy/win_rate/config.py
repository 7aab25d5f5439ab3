"""The recipe of a win rate: ``python -m policy.win_rate --config RECIPE.yaml``. Known without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from policy.judging.config import JudgeConfig
from rlhf.core.annotations import NoResult


@dataclass(frozen=True, kw_only=True)
class WinRateConfig:
    """Answers of two models to the same questions, and who judges them."""

    output: Annotated[Path, NoResult()]
    """Folder for evaluation.json, items.jsonl and annotations.json."""
    outputs: Path
    """Answers of a model: outputs.json or responses.jsonl of rlhf generate."""
    reference: Path
    """Those of another model to the same questions."""
    reward: str | None = None
    """The judge: the folder of a reward model, the address of a server of one, or module:function. Null: the one behind
    judge.url."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.judge.url is None):
            raise ValueError("expected one judge: reward, or judge.url with judge.model")
