"""The reward model: a backbone, pooled at the last real token, and a float32 head."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from reward.heads import Heads, NonNegativeHead, find_head, judge, linear_layers, mean_head
from rlhf.core.logprobs import response_logprobs
from rlhf.core.masking import last_token_index
from rlhf.data.batching import LengthBucket, token_blocks
from rlhf.models import backbones
from rlhf.models.adapters import merge_adapters
from rlhf.models.hidden_states import backbone_of, last_states

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Scores:
    """What the model says about R rows."""

    rewards: Tensor
    """``(R,)`` float32 rewards in logits."""
    embeddings: Tensor
    """``(R, D)`` input of the head: the last layer's state at the last real token."""
    logprobs: Tensor | None = None
    """``(R,)`` summed log-probabilities of the response tokens under the language-model head."""
    variances: Tensor | None = None
    """``(R,)`` float32 variances of the rewards, where the head knows them."""
    divergences: Tensor | None = None
    """``(R, 2)`` see :class:`reward.heads.Judged`."""
    each: Tensor | None = None
    """``(R, H)`` float32 rewards of the single heads, where there are several."""


class RewardModel(nn.Module):
    """Scores rows of tokens.

    Args:
        hf: a Transformers sequence classifier with one label.
        lm_head: frozen language-model head for the GRM regularizers, or ``None``.
    """

    def __init__(self, hf: PreTrainedModel, lm_head: "LanguageModelHead | None" = None) -> None:
        super().__init__()
        self.hf = hf
        self.lm_head = lm_head
        self.is_decoder = hasattr(hf, "score")
        self._adapters: tuple[PeftModel, ...] = ()
        self._head_input: list[Tensor] = []
        self.head_origin = ""
        """Where the head that training starts from was taken from, in words; empty for a model that is only asked."""
        if not self.is_decoder:
            final = linear_layers(find_head(hf))[-1]
            final.register_forward_pre_hook(self._note_head_input)

    def _note_head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._head_input[:] = inputs[:1]

    def forward(self, buckets: Sequence[LengthBucket]) -> Scores:
        """Score right-padded length buckets, one after the other; rows come back in the order of the buckets."""
        if self.is_decoder:
            blocks = last_states(self.hf, *token_blocks(buckets))
            parts = [self._score_states(states, bucket) for states, bucket in zip(blocks, buckets, strict=True)]
        else:
            parts = [self._score_encoder(bucket.tokens, bucket.token_mask) for bucket in buckets]
        columns = [_joined([getattr(part, field.name) for part in parts]) for field in fields(Scores)]
        return Scores(*columns)  # type: ignore[arg-type]

    def _score_states(self, states: Tensor, bucket: LengthBucket) -> Scores:
        scores = self._pool(states, bucket.token_mask.sum(dim=1) - 1)  # padded on the right, and none is empty
        if self.lm_head is None:
            return scores
        return replace(scores, logprobs=self.lm_head(states, bucket))

    def score(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """``(R,)`` rewards of ``(R, T)`` rows padded on either side, found by the mask alone."""
        return self.score_in_full(tokens, token_mask).rewards

    def score_in_full(self, tokens: Tensor, token_mask: Tensor) -> Scores:
        """All that is known of ``(R, T)`` rows padded on either side, found by the mask alone."""
        if not self.is_decoder:
            return self._score_encoder(tokens, token_mask)
        positions = (token_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        output = backbone_of(self.hf)(
            input_ids=tokens, attention_mask=token_mask.long(), position_ids=positions, use_cache=False
        )
        return self._pool(output.last_hidden_state, last_token_index(token_mask))

    def _pool(self, states: Tensor, last: Tensor) -> Scores:
        rows = torch.arange(len(states), device=states.device)
        pooled = states[rows, last]
        judged = judge(self.hf.get_submodule("score"), pooled)
        return Scores(
            judged.rewards, pooled, variances=judged.variances, divergences=judged.divergences, each=judged.each
        )

    def _score_encoder(self, tokens: Tensor, token_mask: Tensor) -> Scores:
        """Encoders pool by a part of their own (the first token); the embedding is what their last layer reads."""
        logits = self.hf(input_ids=tokens, attention_mask=token_mask.long()).logits
        return Scores(logits.float().squeeze(-1), self._head_input.pop())

    @property
    def adapters(self) -> "tuple[PeftModel, ...]":
        """The peft wrapper under LoRA; else nothing."""
        return self._adapters

    @property
    def head(self) -> nn.Module:
        """What makes a score of a state."""
        return find_head(self.hf)

    @property
    def heads(self) -> int:
        """How many heads the reward is the mean of."""
        head = self.head
        return head.out_features if isinstance(head, Heads) else 1

    @property
    def knows_variance(self) -> bool:
        """Whether a reward comes with its variance."""
        return isinstance(self.head, NonNegativeHead)

    def keep_means(self) -> None:
        """Have a head that is random in training, or several, become one that gives their mean, as a critic needs."""
        if self.is_decoder:
            self.hf.score = mean_head(self.head)

    def merged(self) -> PreTrainedModel:
        """The Transformers model with adapters merged into its weights. Ends training of this object."""
        for adapter in self._adapters:
            merge_adapters(adapter)
        return self.hf


class LanguageModelHead(nn.Module):
    """A frozen copy of the model's output projection, for log-probabilities of the responses (GRM)."""

    def __init__(self, weight: Tensor, settings: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self._logits = backbones.logit_options(settings)

    def forward(self, states: Tensor, bucket: LengthBucket) -> Tensor:
        """``(R,)`` log-probabilities summed over response tokens; position t predicts token t + 1."""
        tokens, mask, places = bucket.tokens[:, 1:], bucket.response_mask[:, 1:], bucket.places()
        sums, _ = response_logprobs(states[:, :-1], self.weight, tokens, mask, places=places, **self._logits)
        return sums


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """All rows of several parts, of which all hold something or none does."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
