"""Rewards of rollouts: from reward models, here or behind an address, Python functions, or sums of these."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policy.ppo.reward_options import RewardSourceConfig, RewardTermConfig
from policy.ppo.rollouts import Reencoded, Rollouts, ask, closed
from reward.function import Answers, Failure, load_function
from reward.model import Scores
from reward.saving import load_reward_model
from reward.serving.client import RewardServers
from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import digest
from rlhf.data.batching import Batch
from rlhf.data.prompts import Prompt, PromptDataset
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.build import DTYPES, precision_of
from rlhf.engine.frozen import Frozen
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import weights_digest
from rlhf.models.manifest import Manifest, read_manifest
from rlhf.models.roles import ModelRole
from rlhf.train.batches import BatchMaker
from rlhf.train.chat import load_chat
from rlhf.train.roles import frozen_of, is_shared_out

CHECKED_PROMPTS = 64
"""Prompts of training and of evaluation that are looked at for the columns that reward functions need."""


@dataclass(frozen=True)
class Scored:
    """``(N,)`` each, the same on every rank."""

    raw: Tensor
    """float32 rewards as the model or function gives them; of an ensemble, their mean; of terms, their sum."""
    scores: Tensor
    """float32 scores, standardized and combined: what the policy is trained on, before clipping and penalties."""
    unknown: Tensor | None = None
    """bool, True on the responses that nothing is known of, whose scores are 0; ``None`` where all are known."""
    failed: int = 0
    """Responses that a function failed on, over all terms."""
    terms: Mapping[str, "Scored"] = field(default_factory=dict)
    """What the terms of a sum say, by name."""

    @property
    def known(self) -> Tensor:
        """``(N,)`` bool, True on the responses that have a score."""
        return torch.ones(len(self.scores), dtype=torch.bool) if self.unknown is None else ~self.unknown

    def at(self, places: Tensor) -> "Scored":
        """Those of the responses ``places``, ``(n,)`` int64. Failures stay those of all."""
        unknown = None if self.unknown is None or not bool(self.unknown[places].any()) else self.unknown[places]
        terms = {name: term.at(places) for name, term in self.terms.items()}
        return Scored(self.raw[places], self.scores[places], unknown, self.failed, terms)


def joined_scores(parts: Sequence[Scored]) -> Scored:
    """Scores of all ``parts``, of one scorer."""
    unknown = torch.cat([~part.known for part in parts])
    return Scored(
        torch.cat([part.raw for part in parts]),
        torch.cat([part.scores for part in parts]),
        unknown if bool(unknown.any()) else None,
        sum(part.failed for part in parts),
        {name: joined_scores([part.terms[name] for part in parts]) for name in parts[0].terms},
    )


class Scorer(Protocol):
    """Judges rollouts. Every rank must call it."""

    identity: str
    """A name for what it says, for checkpoints."""

    def score(self, rollouts: Rollouts) -> Scored: ...


@dataclass(frozen=True, kw_only=True)
class ScorerParts:
    """What a scorer is built with."""

    ranks: Ranks
    engine: EngineConfig
    chat: ChatFormat
    """The policy's tokenizer and chat template."""
    maker: BatchMaker
    prompts: Sequence[PromptDataset]
    """All prompts of the run."""


class FunctionScorer:
    """A Python function; the ranks share the rows."""

    def __init__(self, term: RewardTermConfig, parts: ScorerParts) -> None:
        """Build the function.

        Raises:
            ConfigError: if there is no such function, it does not know one of its options, or needs a column that the
                rows do not have.
        """
        given = [dict(each) for each in (term.options, term.columns) if each]
        self.identity = " ".join([term.function, *(json.dumps(each, sort_keys=True) for each in given)])
        self._term, self._ranks = term, parts.ranks
        function = load_function(
            term.function,
            options=term.options,
            columns=term.columns,
            timeout_seconds=term.timeout_seconds,
            concurrency=term.concurrency,
        )
        for prompts in filter(len, parts.prompts):
            some = _some_of(prompts, function.needs)
            function = function.reading([prompt.messages for prompt in some], [prompt.columns for prompt in some])
        self._function = function

    def score(self, rollouts: Rollouts) -> Scored:
        """Values that are not finite come back as they are.

        Raises:
            DataError: if the function fails on more responses than it may, or does not give one number (or ``None``)
                for each.
        """
        ranks = self._ranks
        mine = list(range(len(rollouts)))[ranks.rank :: ranks.world_size]
        given: list[float | Failure | None] = [None] * len(rollouts)
        for rank, part in enumerate(ranks.gather_objects(ranks.together(lambda: self._call(rollouts, mine)))):
            given[rank :: ranks.world_size] = part
        failures = [each for each in given if isinstance(each, Failure)]
        if len(failures) > self._term.failures * len(given):
            raise DataError(
                f"the reward function {self._term.function} failed on {len(failures)} of {len(given)} responses, more "
                f"than its failures = {self._term.failures:g} lets pass: {failures[0].what}"
            )
        numbers = [each if isinstance(each, float) else None for each in given]
        values = torch.tensor([0.0 if each is None else each for each in numbers])
        unknown = torch.tensor([each is None for each in numbers])
        return Scored(values, values, unknown if bool(unknown.any()) else None, len(failures))

    def _call(self, rollouts: Rollouts, rows: list[int]) -> Sequence[float | Failure | None]:
        if not rows:  # there are fewer responses than ranks
            return []
        answers = Answers(
            prompts=[rollouts.prompts[row].messages for row in rows],
            responses=[rollouts.texts[row] for row in rows],
            token_ids=[rollouts.responses[row].tokens.tolist() for row in rows],
            ended=[rollouts.responses[row].ended for row in rows],
            columns=[rollouts.prompts[row].columns for row in rows],
        )
        return self._function.each(answers) if self._term.failures else self._function(answers)


def _some_of(prompts: PromptDataset, needed: Sequence[str]) -> list[Prompt]:
    """Prompts whose rows tell the columns of all; all prompts, where some lack a column that few may have."""
    places = np.unique(np.linspace(0, len(prompts) - 1, min(CHECKED_PROMPTS, len(prompts))).astype(int))
    some = [prompts.prompt(place) for place in places.tolist()]
    if {name for prompt in some for name in prompt.columns} >= set(needed):
        return some
    return [prompts.prompt(place) for place in range(len(prompts))]


class ModelScorer:
    """One reward model, asked in micro-batches; standardized by its manifest."""

    def __init__(self, role: ModelRole, config: RewardSourceConfig, parts: ScorerParts, *, alone: bool = False) -> None:
        """Every rank must call it; ``alone`` if it is all there is: then its heads are the ensemble.

        Raises:
            ModelError: if it is no published reward model, or reads text in another way than the policy.
        """
        folder = Path(role.backbone.path)
        ranks = parts.ranks
        manifest = ranks.together(lambda: read_manifest(folder))
        self._maker, self._standardize = parts.maker, config.standardize
        self._statistics = manifest.rewards if config.standardize else None
        self._retokenize, self._chat = config.retokenize, parts.chat
        self._cut = config.truncated == "score"
        self._origin = f"{role.setting} = {folder}"
        ranks.together(lambda: self._check(manifest))
        if config.retokenize:
            self._chat = ranks.together(lambda: load_chat(role.backbone.path))
            ranks.on_main(lambda: check_shown(self._origin, self._chat, parts.prompts))
        else:
            form = manifest.tokenizer_digest, manifest.template_digest
            ranks.together(lambda: check_same_text(self._origin, *form, parts.chat))
        dtype, shared = DTYPES[precision_of(parts.engine)], is_shared_out(role, parts.engine)
        module = ranks.together(lambda: load_reward_model(folder, dtype=dtype, shared=shared).requires_grad_(False))
        width = module.hf.config.hidden_size
        self._combine, self._deviations = config.combine if alone else "mean", config.deviations
        self._heads = module.heads
        if self._combine != "mean" and self._heads == 1 and not (module.knows_variance and self._combine != "min"):
            raise ModelError(
                f"reward.combine = {config.combine} needs an ensemble, and {self._origin} has one head that "
                "knows no deviation: give several folders, or a model of several heads (model.heads of its recipe)"
            )
        self._model: Frozen = frozen_of(role, module, parts.engine, ranks, hidden_size=width)
        scale = () if self._statistics is None else (self._statistics.mean, self._statistics.standard_deviation)
        self.identity = _identity(ranks.on_main(lambda: weights_digest(role.backbone)), *scale)
        if self._combine != "mean":
            self.identity = digest(self._combine, str(self._deviations), self.identity)

    def score(self, rollouts: Rollouts) -> Scored:
        shown = Reencoded if self._retokenize else closed
        rows = shown(rollouts, self._chat, cut=self._cut)
        found = ask(self._model, self._maker, rows, _rewards, 2 + self._heads)
        raw, deviations, each = found[:, 0], found[:, 1], found[:, 2:].T
        mean, unit = 0.0, 1.0
        if self._statistics is not None:
            mean, unit = self._statistics.mean, self._statistics.standard_deviation
        if self._combine == "mean":
            return Scored(raw, (raw - mean) / unit)
        if self._heads > 1:
            return Scored(raw, combine((each - mean) / unit, self._combine, self._deviations))
        return Scored(raw, (raw - mean - self._deviations * deviations) / unit)

    def _check(self, manifest: Manifest) -> None:
        if manifest.stage != "reward":
            raise ModelError(f"{self._origin}: the {manifest.stage} stage published it, it is no reward model")
        if self._standardize:
            check_deviation(self._origin, None if manifest.rewards is None else manifest.rewards.standard_deviation)


class ServedScorer:
    """A reward model behind one or several addresses. The main rank asks for all; it is standardized by its card."""

    def __init__(self, setting: str, term: RewardTermConfig, config: RewardSourceConfig, parts: ScorerParts) -> None:
        """Every rank must call it. ``setting``: the key that names the servers.

        Raises:
            ModelError: if a server cannot be asked, they serve different models, or one that reads text in another way
                than the policy.
        """
        self._ranks, self._chat, self._config = parts.ranks, parts.chat, config
        self._servers = RewardServers(
            term.urls,
            timeout_seconds=term.timeout_seconds,
            concurrency=term.concurrency,
            patience_seconds=term.patience_seconds,
            setting=setting,
        )
        origin = f"{setting} = {', '.join(term.urls)}"
        self._card = card = parts.ranks.on_main(lambda: self._servers.card)
        if config.standardize:
            parts.ranks.together(lambda: check_deviation(origin, card.deviation))
        if config.retokenize:
            parts.ranks.on_main(lambda: check_shown_there(origin, self._servers, parts.prompts))
        else:
            parts.ranks.together(lambda: check_same_text(origin, card.tokenizer, card.template, parts.chat))
        scale = (card.mean, card.deviation) if config.standardize else ()
        self.identity = _identity(card.weights, *scale)

    def score(self, rollouts: Rollouts) -> Scored:
        """Every rank must call it.

        Raises:
            ModelError: naming the server, if a response stays without a score.
        """
        raw = torch.tensor(self._ranks.on_main(lambda: self._ask(rollouts)))
        if not self._config.standardize:
            return Scored(raw, raw)
        assert self._card.mean is not None and self._card.deviation is not None
        return Scored(raw, (raw - self._card.mean) / self._card.deviation)

    def _ask(self, rollouts: Rollouts) -> list[float]:
        if self._config.retokenize:
            asked = zip(rollouts.prompts, rollouts.texts, strict=True)
            return self._servers.score_conversations(
                [[*prompt.messages, {"role": "assistant", "content": text}] for prompt, text in asked]
            )
        rows = closed(rollouts, self._chat, cut=self._config.truncated == "score")
        return self._servers.score_tokens([rows.item(place).rows[0].tokens for place in range(len(rows))])


class Ensemble:
    """Several reward models of one mind, or not."""

    def __init__(self, members: Sequence[ModelScorer], config: RewardSourceConfig) -> None:
        self._members, self._config = members, config
        self.identity = digest(config.combine, str(config.deviations), *(member.identity for member in members))

    def score(self, rollouts: Rollouts) -> Scored:
        said = [member.score(rollouts) for member in self._members]
        scores = torch.stack([each.scores for each in said])
        raw = torch.stack([each.raw for each in said]).mean(dim=0)
        return Scored(raw, combine(scores, self._config.combine, self._config.deviations))


class Sum:
    """Terms that are added up by weight. A term that has no word on a response adds nothing to its score."""

    def __init__(self, terms: Mapping[str, tuple[float, Scorer]]) -> None:
        """``terms``: weight and scorer, by name."""
        self._terms = terms
        self.identity = digest(*(f"{weight:g} {scorer.identity}" for weight, scorer in terms.values()))

    def score(self, rollouts: Rollouts) -> Scored:
        said = {name: scorer.score(rollouts) for name, (_, scorer) in self._terms.items()}
        total = torch.stack([self._terms[name][0] * each.scores for name, each in said.items()]).sum(dim=0)
        unknown = ~torch.stack([each.known for each in said.values()]).any(dim=0)
        failed = sum(each.failed for each in said.values())
        return Scored(total, total, unknown if bool(unknown.any()) else None, failed, said)


def combine(scores: Tensor, how: str, deviations: float) -> Tensor:
    """``(N,)`` from ``(M, N)`` scores of M models: their mean, their minimum, or mean minus so many deviations.

    References:
        Coste et al. (2023), arXiv:2310.02743, section 3.1: worst-case and uncertainty-weighted optimization.
    """
    if how == "min":
        return scores.min(dim=0).values
    mean = scores.mean(dim=0)
    return mean if how == "mean" else mean - deviations * scores.std(dim=0, correction=0)


def build_scorer(
    config: RewardSourceConfig, roles: Sequence[ModelRole], parts: ScorerParts, section: str = "reward"
) -> Scorer:
    """What a ``section`` of the recipe asks for, with its ``roles`` if it names models. Every rank must call it."""
    if not config.all_terms:
        members = [ModelScorer(role, config, parts, alone=len(roles) == 1) for role in roles]
        return members[0] if len(members) == 1 else Ensemble(members, config)
    models = iter(roles)
    terms: dict[str, tuple[float, Scorer]] = {}
    for number, term in enumerate(config.all_terms, start=1):
        name = term.name if term.name not in terms else f"{term.name} {number}"
        setting = f"{section}.terms[{number - 1}]" if config.terms else section
        terms[name] = term.weight, _term_scorer(setting, term, config, models, parts)
    return Sum(terms) if config.terms else next(iter(terms.values()))[1]


def _term_scorer(
    setting: str, term: RewardTermConfig, config: RewardSourceConfig, models: Iterator[ModelRole], parts: ScorerParts
) -> Scorer:
    """The scorer of a term, whose keys stand below ``setting``."""
    if term.path:
        return ModelScorer(next(models), config, parts)
    if term.urls:
        return ServedScorer(f"{setting}.url", term, config, parts)
    return parts.ranks.together(lambda: FunctionScorer(term, parts))


def _identity(weights: str, *scale: float | None) -> str:
    """A name for a model, and for the ``scale`` that its rewards are brought to, if to any."""
    return digest(weights, *map(str, scale)) if scale else weights


def check_deviation(origin: str, deviation: float | None) -> None:
    """Refuse to standardize by no deviation; ``origin`` is the key of the recipe with its value.

    Raises:
        ModelError: naming the ways out.
    """
    if deviation is None or not deviation > 0:
        raise ModelError(
            f"{origin}: its manifest has no deviation of held-out rewards to standardize by; train it with "
            "data.eval_share, or set reward.standardize=false"
        )


def check_same_text(origin: str, tokenizer: str, template: str, chat: ChatFormat) -> None:
    """Refuse a reward model that would read the policy's tokens as another text.

    Args:
        origin: the key of the recipe with its value.
        tokenizer, template: the digests of the reward model.
        chat: of the policy.
    Raises:
        ModelError: naming what differs and the way out.
    """
    differ = []
    if tokenizer not in {chat.tokenizer_digest, *chat.former_tokenizer_digests}:
        differ.append(f"its tokenizer ({tokenizer}, the policy's is {chat.tokenizer_digest})")
    if template != chat.digest:
        differ.append(f"its chat template ({template}, the policy's is {chat.digest})")
    if differ:
        raise ModelError(
            f"{origin} was trained on another form of text than the policy writes: "
            f"{' and '.join(differ)} differ(s). Give the data.template that it was trained with (data.system_prompt "
            "and data.thoughts=drop are part of it), or set reward.retokenize=true to decode each response and encode "
            "it anew"
        )


def check_shown(origin: str, chat: ChatFormat, sources: Iterable[PromptDataset]) -> None:
    """Refuse a reward model whose own template cannot show it each prompt of the run.

    Args:
        origin: the key of the recipe with its value.
        chat: of the reward model.
        sources: all prompts.
    Raises:
        ModelError: naming how many it cannot show, the first of them, and the way out.
    """
    faults, total = {}, 0
    for prompts in sources:
        total += len(prompts)
        for index in range(len(prompts)):
            try:
                chat.render_prompt(prompts.prompt(index).messages)
            except TemplateFault as fault:
                faults[prompts.row_id(index)] = str(fault)
    _tell_of(faults, total, f"{origin}: its chat template ({chat.origin})")


def check_shown_there(origin: str, servers: RewardServers, sources: Iterable[PromptDataset]) -> None:
    """Refuse a served model whose template cannot show it each prompt, as :func:`check_shown`: its server is asked."""
    names, messages = [], []
    for prompts in sources:
        names += [prompts.row_id(index) for index in range(len(prompts))]
        messages += [prompts.prompt(index).messages for index in range(len(prompts))]
    faults = {names[place]: why for place, why in servers.refusals(messages).items()}
    _tell_of(faults, len(names), f"{origin}: the chat template that is served")


def _tell_of(faults: Mapping[str, str], total: int, who: str) -> None:
    if faults:
        row, first = next(iter(faults.items()))
        raise ModelError(
            f"{who} cannot show {len(faults)} of {total} prompts, such as {row}: {first}. Take a reward model whose "
            "template shows them, or leave these prompts out"
        )


def _rewards(output: Scores, batch: Batch) -> Tensor:
    """``(B, 2 + H)``: reward, standard deviation (0 where none is known), and the rewards of the single heads."""
    (rewards,) = batch.sides(output.rewards)
    (deviations,) = batch.sides(output.rewards.new_zeros(()).expand_as(output.rewards))
    if output.variances is not None:
        (deviations,) = batch.sides(output.variances.sqrt())
    heads = [rewards] if output.each is None else [batch.sides(each)[0] for each in output.each.unbind(dim=1)]
    return torch.stack([rewards, deviations, *heads], dim=1)
