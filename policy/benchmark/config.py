"""The recipe of a benchmark: ``python -m policy.benchmark --config RECIPE.yaml``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt

from reward.benchmarks.names import NAMES
from rlhf.core.annotations import NoResult
from rlhf.data.options import ColumnConfig
from rlhf.engine.options import Precision


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """A reward model and the labeled answers that it is judged by."""

    output: Annotated[Path, NoResult()]
    """Folder for evaluation.json, items.jsonl and benchmark.md."""
    model: Path
    """Folder of a reward model; or, with `reference`, of a policy."""
    reference: Path | None = None
    """Folder of the model that the policy in `model` was trained from. An answer's reward is then the implicit one of
    DPO: its log-probability under the policy, less that under this one (Rafailov et al. 2023, eq. 5, with beta 1)."""
    url: Annotated[str | tuple[str, ...], NoResult()] = ()
    """The address of a server of the reward model in `model`, or of several, which score in place of this process; the
    folder is still read for tokenizer and template."""
    benchmark: str = "pairs"
    """pairs (any file of preference pairs), hh, rewardbench, rewardbench2, rm-bench, judgebench or ppe."""
    data: str | None = None
    """File, folder or hub name, in the benchmark's published format; null: where it is published on the hub."""
    split: str | None = None
    """Split of a hub data set or of a folder; null: the benchmark's own."""
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    """Names of the columns of pairs and hh; `group` names the subsets of a table by subset."""
    template: str | None = None
    """Chat template; see data.template of the stages. Null: that of the model."""
    max_tokens: Annotated[int, Gt(0)] | None = None
    """Longer texts lose the beginning of their prompt, and are counted. Null: what the model takes."""
    wrong_prompt: bool = True
    """Score each answer under another item's prompt, too: a model that does as well there has not read the prompt."""
    batch_tokens: Annotated[int, Gt(0), NoResult()] = 8192
    """Padded tokens at once on each rank."""
    precision: Precision | Literal["auto"] = "auto"
    """Type of the weights; auto as in the stages: bfloat16 on a GPU that has it, else float32."""

    def __post_init__(self) -> None:
        if self.benchmark not in NAMES:
            raise ValueError(f"benchmark = {self.benchmark}: there are {', '.join(NAMES)}")
        if self.urls and self.reference is not None:
            raise ValueError(f"url = {', '.join(self.urls)}: serves a reward model, and reference is for a policy")

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of all servers."""
        return (self.url,) if isinstance(self.url, str) and self.url else tuple(self.url)
