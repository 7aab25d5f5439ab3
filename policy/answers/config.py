"""The recipe of answers: ``python -m policy.answers --config RECIPE.yaml``. Known without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from policy.evaluation.options import SamplingSettings
from rlhf.core.annotations import NoResult
from rlhf.engine.options import Precision

FORMATS = {
    "alpaca_eval": "AlpacaEval: rows with instruction; outputs.json",
    "mt_bench": "MT-Bench: rows with question_id, category, turns; model_answer/NAME.jsonl, as FastChat reads it",
    "arena_hard": "Arena-Hard: rows with question_id and turns (v0.1) or uid and prompt (v2); model_answer/NAME.jsonl",
    "prompts": "any file of prompts: texts, or messages; responses.jsonl",
}
"""What questions are read and answers written as."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "margin_paper": {
        "sampling.temperature": 0.7,
        "sampling.top_p": 0.9,
        "sampling.repetition_penalty": 1.1,
        "sampling.max_new_tokens": 1024,
        "category_temperatures": False,
    },
    "greedy": {"sampling.top_k": 1, "category_temperatures": False},
}
"""Sampling by name: ``margin_paper`` as the paper of Adaptive Margin-Sigmoid and APO-hinge-zero evaluates."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A policy, questions, and how its answers are drawn and written."""

    output: Annotated[Path, NoResult()]
    """Folder for the answers."""
    model: Path
    """Folder of the policy: final/ of a run, or any chat model."""
    prompts: Path
    """The questions: a file as the benchmark has it, or prompts as PPO reads them."""
    format: Literal["auto", "alpaca_eval", "mt_bench", "arena_hard", "prompts"] = "auto"
    """What the questions are; auto: what their columns say."""
    name: str | None = None
    """What the policy is called in the answers; null: the run's folder, or the model's."""
    preset: Literal["margin_paper", "greedy"] | None = None
    """Settings of the sampling by name, in the place of defaults: margin_paper (temperature .7, top_p .9, repetition
    penalty 1.1, 1024 tokens) or greedy."""
    category_temperatures: bool = True
    """Draw each category of MT-Bench at FastChat's temperature for it (writing .7, math 0 and so on); false: all at
    sampling.temperature."""
    template: str | None = None
    """Chat template; see data.template of the stages."""
    template_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the template; see data.template_options of the stages."""
    fold_system: bool = False
    """See data.fold_system of the stages."""
    system_prompt: str | None = None
    """Put before conversations that have no system message."""
    precision: Precision | Literal["auto"] = "auto"
    """Type of the weights; auto as in the stages: bfloat16 on a GPU that has it, else float32."""
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(samples=1, max_new_tokens=1024))

    @staticmethod
    def defaults_given(values: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that depend on what a recipe says; see :func:`rlhf.config.load_config`."""
        return dict(PRESETS.get(values.get("preset") or "", {}))
