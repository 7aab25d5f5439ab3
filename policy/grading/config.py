"""The recipe of grades: ``python -m policy.grading --config RECIPE.yaml``. Known without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from policy.judging.config import JudgeConfig
from rlhf.core.annotations import NoResult


@dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """Answers of one model or several to the same questions, and the judge that grades them."""

    output: Annotated[Path, NoResult()]
    """Folder for evaluation.json, items.jsonl, model_judgment/ and radar.svg."""
    answers: Annotated[dict[str, Path], MinLen(1)]
    """What each model answered, by its name: model_answer/NAME.jsonl of MT-Bench, outputs.json, or responses.jsonl of
    rlhf generate. The others are compared with the first one."""
    questions: Path | None = None
    """MT-Bench's question.jsonl; not needed for answers that hold their questions."""
    references: Path | None = None
    """Right answers to math, reasoning and coding: FastChat's reference_answer/MODEL.jsonl. Null: those in the column
    reference of the questions, where they have one."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        if self.judge.url is None:
            raise ValueError("judge.url: expected the address of an endpoint, such as https://api.openai.com/v1")
