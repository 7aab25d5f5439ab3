"""The recipe of a tax: ``python -m policy.tax --config RECIPE.yaml``. Known without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from rlhf.core.annotations import NoResult


@dataclass(frozen=True, kw_only=True)
class TaxConfig:
    """A model before training and after it, and the tasks that both do."""

    output: Annotated[Path, NoResult()]
    """Folder for evaluation.json and items.jsonl."""
    before: Path
    """Folder of the model that training started from."""
    after: Path
    """Folder of the trained one."""
    tasks: Annotated[tuple[str, ...], MinLen(1)]
    """Names of lm-eval's tasks or groups, such as hellaswag or mmlu."""
    include: Path | None = None
    """Folder with further tasks, in lm-eval's YAML."""
    limit: Annotated[int, Gt(0)] | None = None
    """Items of each task at most, the first ones; null: all."""
    shots: Annotated[int, Ge(0)] | None = None
    """Examples before each item; null: as many as the task says."""
    chat: bool = False
    """Put items into the model's chat template."""
    batch_size: Annotated[int, Gt(0), NoResult()] = 8
    """Items at once."""
    device: Annotated[str | None, NoResult()] = None
    """cpu, cuda, cuda:1 and so on; null: a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto: that of the files."""
