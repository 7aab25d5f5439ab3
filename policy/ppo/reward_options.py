"""Where the rewards of a PPO run come from, as its recipe says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from reward.function import CONCURRENCY, TIMEOUT_SECONDS
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import ModelRole

STANDARDIZED_LIMIT = 10.0
"""Bound on scores of mean 0 and deviation 1."""


@dataclass(frozen=True, kw_only=True)
class RewardTermConfig:
    """One of several rewards that are added up: a reward model or a Python function."""

    path: str = ""
    """final/ of a reward run."""
    function: str = ""
    """module:function(prompts, responses, ...) in its place."""
    weight: float = 1.0
    """What its scores are multiplied by before they are added up."""
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of the function, by name."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column that a parameter of the function stands for, where they differ in name: {answer: solution}."""
    failures: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the responses of a step that the function may fail on or be late for: they are left out of this term.
    Beyond it, the run stops."""
    timeout_seconds: Annotated[float, Gt(0)] = TIMEOUT_SECONDS
    """What an asynchronous function may take for one response."""
    concurrency: Annotated[int, Gt(0)] = CONCURRENCY
    """Responses that a rank asks an asynchronous function about at one time."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.function):
            raise ValueError("give either path (the final/ folder of a reward run) or function (module:function)")
        if self.path and (self.options or self.columns or self.failures):
            raise ValueError(f"path = {self.path}: options, columns and failures are those of a function")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight = {self.weight}: expected a finite number")

    @property
    def name(self) -> str:
        """What its scores are called in the log."""
        return self.function.rpartition(":")[2] if self.function else Path(self.path).parent.name or self.path


@dataclass(frozen=True, kw_only=True)
class RewardSourceConfig:
    """Where rewards come from: reward models, a Python function, or several of these, added up."""

    path: str | tuple[str, ...] = ()
    """final/ of a reward run, or a list of these: an ensemble."""
    function: str | None = None
    """module:function(prompts, responses, ...) -> scores, in place of models: rules, gold scorers. By the names of its
    parameters it gets columns of the rows, messages, token_ids, ended (docs/ppo.md); None leaves a response out."""
    terms: tuple[RewardTermConfig, ...] = ()
    """Several models and functions, whose scores are added up by weight; in place of path and function."""
    combine: Literal["mean", "min", "mean_minus_sd"] = "mean"
    """What an ensemble says: its mean, its most doubtful member, or the mean minus `deviations` standard deviations.
    Several models are one, a model of several heads (model.heads) is; one with a Bayesian head knows a deviation."""
    deviations: Annotated[float, Ge(0)] = 1.0
    """How many standard deviations mean_minus_sd takes off."""
    standardize: bool = True
    """Bring the scores of a model to mean 0 and deviation 1 by the statistics of its manifest."""
    retokenize: bool = False
    """Decode, apply the reward model's own template and encode again: for a reward model of another family. Off, a
    reward model whose tokenizer or template differ from the policy's is refused."""
    placement: str = "replicated"
    """Where the models live: replicated (whole on every rank), zero3, zero3_offload, or a DeepSpeed JSON."""
    clip: Annotated[float, Gt(0)] | Literal["auto"] | None = "auto"
    """Bound on the score that enters the reward; null for none. auto: 10 deviations where scores are standardized, and
    none for functions and raw scores, whose scale nobody knows. clipped_share of the log says how many it cuts."""
    truncated: Literal["score", "end", "penalty", "mask"] = "end"
    """How a response that ran into the length limit is scored, with own tokens as with retokenize. end: by what it says
    so far, with an end token behind it, as reward models know texts. score: as it stands, cut off, which reward models
    have not seen. penalty: not at all, its score is minus missing_end_penalty. mask: nothing is learned from it."""
    missing_end_penalty: Annotated[float, Ge(0)] = 0.0
    """Taken off the score of a response that ran into the length limit; with truncated = penalty, all of its score."""
    length_penalty: Annotated[float, Ge(0)] = 0.0
    """Taken off the score of a response of rollout.max_new_tokens; less, linearly, of one longer than
    `length_free_tokens`."""
    length_free_tokens: Annotated[int, Ge(0)] = 0
    """Tokens that length_penalty does not count."""

    def __post_init__(self) -> None:
        if [bool(self.path), bool(self.function), bool(self.terms)].count(True) != 1:
            raise ValueError("give one of path (the final/ folder of a reward run, or several), function and terms")
        if not self.path and self.combine != "mean":
            raise ValueError(f"combine = {self.combine} needs an ensemble: several folders in path, or many heads")
        if self.truncated == "penalty" and not self.missing_end_penalty:
            raise ValueError("truncated = penalty scores what was cut off minus missing_end_penalty: set that above 0")
        if self.truncated == "mask" and self.missing_end_penalty:
            raise ValueError(
                f"truncated = mask learns nothing from responses that were cut off: missing_end_penalty = "
                f"{self.missing_end_penalty} would count for nothing"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders of all models."""
        if self.terms:
            return tuple(term.path for term in self.terms if term.path)
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def models_setting(self) -> str:
        """The key that names the models."""
        return "terms" if self.terms else "path"

    @property
    def all_terms(self) -> tuple[RewardTermConfig, ...]:
        """The terms, of which a function by itself is one; none for models without terms."""
        return (RewardTermConfig(function=self.function),) if self.function else self.terms

    @property
    def score_limit(self) -> float | None:
        """The bound of ``clip``; ``None`` for none."""
        if self.clip != "auto":
            return self.clip
        functions = self.function or any(term.function for term in self.terms)
        return STANDARDIZED_LIMIT if self.standardize and not functions else None


def scorer_roles(name: str, section: str, config: RewardSourceConfig) -> tuple[ModelRole, ...]:
    """One for each model of an ensemble or of the terms; none for a function."""
    names = [name] if len(config.paths) == 1 else [f"{name} {number}" for number, _ in enumerate(config.paths, start=1)]
    return tuple(
        ModelRole(
            name=each,
            section=section,
            setting=f"{section}.{config.models_setting}",
            backbone=BackboneConfig(path=path),
            kind="reward model",
            placement=config.placement,
            placed_by=f"{section}.placement",
            hub=False,
        )
        for each, path in zip(names, config.paths, strict=True)
    )
