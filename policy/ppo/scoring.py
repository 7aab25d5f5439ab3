"""Rewards of rollouts: from reward models with a manifest, from an ensemble of them, or from a Python function."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from policy.ppo.config import RewardSourceConfig
from policy.ppo.rollouts import Reencoded, Rollouts, ask, closed
from reward.function import RewardFunction, load_reward
from reward.model import Scores, load_reward_model
from rlhf.core.errors import DataError, ModelError, UserError
from rlhf.core.files import digest
from rlhf.data.batching import Batch
from rlhf.data.prompts import PromptDataset
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


class Scored(NamedTuple):
    """``(N,)`` float32 each, the same on every rank."""

    raw: Tensor
    """Rewards as the model or function gives them; of an ensemble, their mean."""
    scores: Tensor
    """Scores, standardized and combined: what the policy is trained on, before clipping and penalties."""


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
    """``function(prompts, responses) -> scores``; the ranks share the rows."""

    def __init__(self, spec: str, ranks: Ranks) -> None:
        self.identity = spec
        self._function: RewardFunction = load_reward(spec)
        self._ranks = ranks

    def score(self, rollouts: Rollouts) -> Scored:
        """Values that are not finite come back as they are.

        Raises:
            DataError: if the function raises, or does not give one number per response.
        """
        ranks = self._ranks
        mine = list(range(len(rollouts)))[ranks.rank :: ranks.world_size]
        values = ranks.together(lambda: self._call(rollouts, mine))
        found = torch.empty(len(rollouts))
        for rank, part in enumerate(ranks.gather_objects(values)):
            found[rank :: ranks.world_size] = part
        return Scored(found, found)

    def _call(self, rollouts: Rollouts, rows: list[int]) -> Tensor:
        if not rows:  # there are fewer responses than ranks
            return torch.zeros(0)
        prompts = [rollouts.prompts[row].messages for row in rows]
        responses = [rollouts.texts[row] for row in rows]
        try:
            given = self._function(prompts, responses)
            values = np.asarray([float(value) for value in given], np.float32)
        except UserError:
            raise
        except Exception as error:
            raise DataError(
                f"the reward function {self.identity} failed on {len(rows)} responses: {type(error).__name__}: {error}"
            ) from error
        if len(values) != len(rows):
            raise DataError(
                f"the reward function {self.identity} gave {len(values)} scores for {len(rows)} responses; "
                "expected one number for each, in their order"
            )
        return torch.from_numpy(values)


class ModelScorer:
    """One reward model, asked in micro-batches; standardized by its manifest."""

    def __init__(self, role: ModelRole, config: RewardSourceConfig, parts: ScorerParts) -> None:
        """Every rank must call it.

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
        ranks.together(lambda: self._check(folder, manifest))
        if config.retokenize:
            self._chat = ranks.together(lambda: load_chat(role.backbone.path))
            ranks.on_main(lambda: check_shown(folder, self._chat, parts.prompts))
        else:
            ranks.together(lambda: check_same_text(folder, manifest, parts))
        dtype, shared = DTYPES[precision_of(parts.engine)], is_shared_out(role, parts.engine)
        module = ranks.together(lambda: load_reward_model(folder, dtype=dtype, shared=shared).requires_grad_(False))
        width = module.hf.config.hidden_size
        self._model: Frozen = frozen_of(role, module, parts.engine, ranks, hidden_size=width)
        self.identity = ranks.on_main(lambda: weights_digest(role.backbone))

    def score(self, rollouts: Rollouts) -> Scored:
        shown = Reencoded if self._retokenize else closed
        rows = shown(rollouts, self._chat, cut=self._cut)
        raw = ask(self._model, self._maker, rows, _rewards, 1).squeeze(1)
        if self._statistics is None:
            return Scored(raw, raw)
        return Scored(raw, (raw - self._statistics.mean) / self._statistics.standard_deviation)

    def _check(self, folder: Path, manifest: Manifest) -> None:
        if manifest.stage != "reward":
            raise ModelError(f"reward.path = {folder}: the {manifest.stage} stage published it, it is no reward model")
        if not self._standardize:
            return
        if manifest.rewards is None or not manifest.rewards.standard_deviation > 0:
            raise ModelError(
                f"reward.path = {folder}: its manifest has no deviation of held-out rewards to standardize by; "
                "train it with data.eval_share, or set reward.standardize=false"
            )


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


def combine(scores: Tensor, how: str, deviations: float) -> Tensor:
    """``(N,)`` from ``(M, N)`` scores of M models: their mean, their minimum, or mean minus so many deviations.

    References:
        Coste et al. (2023), arXiv:2310.02743, section 3.1: worst-case and uncertainty-weighted optimization.
    """
    if how == "min":
        return scores.min(dim=0).values
    mean = scores.mean(dim=0)
    return mean if how == "mean" else mean - deviations * scores.std(dim=0, correction=0)


def build_scorer(config: RewardSourceConfig, roles: Sequence[ModelRole], parts: ScorerParts) -> Scorer:
    """What the recipe's section asks for, with its ``roles`` if it names models. Every rank must call it."""
    function = config.function
    if function is not None:
        return parts.ranks.together(lambda: FunctionScorer(function, parts.ranks))
    members = [ModelScorer(role, config, parts) for role in roles]
    return members[0] if len(members) == 1 else Ensemble(members, config)


def check_same_text(folder: Path, manifest: Manifest, parts: ScorerParts) -> None:
    """Refuse a reward model that would read the policy's tokens as another text.

    Raises:
        ModelError: naming what differs and the way out.
    """
    differ = []
    if manifest.tokenizer_digest not in {parts.chat.tokenizer_digest, *parts.chat.former_tokenizer_digests}:
        differ.append(f"its tokenizer ({manifest.tokenizer_digest}, the policy's is {parts.chat.tokenizer_digest})")
    if manifest.template_digest != parts.chat.digest:
        differ.append(f"its chat template ({manifest.template_digest}, the policy's is {parts.chat.digest})")
    if differ:
        raise ModelError(
            f"reward.path = {folder} was trained on another form of text than the policy writes: "
            f"{' and '.join(differ)} differ(s). Give the data.template that it was trained with (data.system_prompt "
            "and data.thoughts=drop are part of it), or set reward.retokenize=true to decode each response and encode "
            "it anew"
        )


def check_shown(folder: Path, chat: ChatFormat, sources: Iterable[PromptDataset]) -> None:
    """Refuse a reward model whose own template cannot show it each prompt of the run.

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
                faults[prompts.row_id(index)] = fault
    if faults:
        row, first = next(iter(faults.items()))
        raise ModelError(
            f"reward.path = {folder}: its chat template ({chat.origin}) cannot show {len(faults)} of {total} prompts, "
            f"such as {row}: {first}. Take a reward model whose template shows them, or leave these prompts out"
        )


def _rewards(output: Scores, batch: Batch) -> Tensor:
    (rewards,) = batch.sides(output.rewards)
    return rewards[:, None]
