"""The recipe of an evaluation: ``python -m policy.evaluation --config RECIPE.yaml``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from policy.evaluation.options import SamplingSettings
from rlhf.core.annotations import NoResult
from rlhf.engine.options import Precision


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Policies, prompts and the reward that they are compared by."""

    output: Annotated[Path, NoResult()]
    """Folder for samples and tables."""
    reference: Path
    """Folder of the model that KL and gains are counted from."""
    policies: dict[str, Path] = field(default_factory=dict)
    """Folders of the policies by name."""
    prompts: Path
    """A file of prompts, as ``data.train`` of PPO: texts, or messages with system message and tools."""
    reward: str
    """module:function(prompts, responses) -> rewards, the folder of a reward model, or the address of a server of one
    (several with commas between): one that no policy was trained against, if it is to judge them."""
    template: str | None = None
    """Chat template of all models; see data.template of the stages."""
    template_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the template; see data.template_options of the stages."""
    fold_system: bool = False
    """See data.fold_system of the stages."""
    precision: Precision | Literal["auto"] = "auto"
    """Type of the weights of all models; auto as in the stages: bfloat16 on a GPU that has it, else float32."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
