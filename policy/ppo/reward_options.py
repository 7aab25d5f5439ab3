"""Where the rewards of a PPO run come from, as its recipe says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from rlhf.core.servers import CONCURRENCY, PATIENCE_SECONDS, TIMEOUT_SECONDS, check_address
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import ModelRole

STANDARDIZED_LIMIT = 10.0
"""Bound on scores of mean 0 and deviation 1."""


@dataclass(frozen=True, kw_only=True)
class RewardTermConfig:
    """One of several rewards that are added up: a reward model, here or served, or a Python function."""

    path: str = ""
    """final/ of a reward run."""
    function: str = ""
    """module:function(prompts, responses, ...) in its place."""
    url: str | tuple[str, ...] = ()
    """The address of a server of a reward model in its place, or of several servers of one model."""
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
    """What an asynchronous function may take for one response, or a server for one request."""
    concurrency: Annotated[int, Gt(0)] = CONCURRENCY
    """Responses that a rank asks an asynchronous function about at one time; of servers, requests on the way."""
    patience_seconds: Annotated[float, Gt(0)] = PATIENCE_SECONDS
    """How long servers may be away or full before the run ends."""

    def __post_init__(self) -> None:
        if [bool(self.path), bool(self.function), bool(self.url)].count(True) != 1:
            raise ValueError(
                "give one of path (the final/ folder of a reward run), function (module:function) and url (of a server)"
            )
        if not self.function and (self.options or self.columns or self.failures):
            named = f"path = {self.path}" if self.path else f"url = {', '.join(self.urls)}"
            raise ValueError(f"{named}: options, columns and failures are those of a function")
        for url in self.urls:
            check_address("url", url)
        if not math.isfinite(self.weight):
            raise ValueError(f"weight = {self.weight}: expected a finite number")

    @property
    def name(self) -> str:
        """What its scores are called in the log."""
        if self.urls:
            return self.urls[0].partition("//")[2].partition("/")[0].replace(":", " ")
        return self.function.rpartition(":")[2] if self.function else Path(self.path).parent.name or self.path

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of all servers."""
        return (self.url,) if isinstance(self.url, str) and self.url else tuple(self.url)


@dataclass(frozen=True, kw_only=True)
class RewardSourceConfig:
    """Where rewards come from: reward models, here or served, a Python function, or several of these, added up."""

    path: str | tuple[str, ...] = ()
    """final/ of a reward run, or a list of these: an ensemble."""
    function: str | None = None
    """module:function(prompts, responses, ...) -> scores, in place of models: rules, gold scorers. By the names of its
    parameters it gets columns of the rows, messages, token_ids, ended (docs/ppo.md); None leaves a response out."""
    url: str | tuple[str, ...] = ()
    """The address of a server of a reward model (rlhf serve reward, or vLLM), or of several servers of one model, which
    are asked in turn; in place of models in this process."""
    terms: tuple[RewardTermConfig, ...] = ()
    """Several models, servers and functions, whose scores are added up by weight; in place of path, function and
    url."""
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
        if [bool(self.path), bool(self.function), bool(self.url), bool(self.terms)].count(True) != 1:
            raise ValueError(
                "give one of path (the final/ folder of a reward run, or several), function, url and terms"
            )
        served = any(term.urls for term in self.all_terms)
        if served and self.retokenize and self.truncated == "score":
            raise ValueError(
                "truncated = score shows a response cut off, and with retokenize = true a server ends each one that it "
                "is shown: take truncated = end, or a policy whose tokens the served model reads (retokenize = false)"
            )
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
    def model_settings(self) -> tuple[str, ...]:
        """The keys that name the models, one for each of :attr:`paths`."""
        if self.terms:
            return tuple(f"terms[{place}].path" for place, term in enumerate(self.terms) if term.path)
        return ("path",) * len(self.paths)

    @property
    def all_terms(self) -> tuple[RewardTermConfig, ...]:
        """The terms, of which a function or a server by itself is one; none for models without terms."""
        if self.function or self.url:
            return (RewardTermConfig(function=self.function or "", url=self.url),)
        return self.terms

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
            setting=f"{section}.{setting}",
            backbone=BackboneConfig(path=path),
            kind="reward model",
            placement=config.placement,
            placed_by=f"{section}.placement",
            hub=False,
        )
        for each, path, setting in zip(names, config.paths, config.model_settings, strict=True)
    )
