"""The policy: a causal language model that says how likely the responses of its rows are."""

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rlhf.core.errors import ModelError
from rlhf.core.logprobs import TokenLogprobs, head_logits, token_logprobs
from rlhf.data.batching import LengthBucket, token_blocks
from rlhf.engine.frozen import Frozen
from rlhf.models import backbones
from rlhf.models.adapters import absolute_base, merge_adapters
from rlhf.models.hidden_states import backbone_of, last_states

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy says of R rows, in the order of the length buckets."""

    logprobs: tuple[Tensor, ...]
    """``(R_b, T_b - 1)`` float32 log-probabilities of each bucket: place t is token t + 1; 0 outside the response."""
    square_sums: tuple[Tensor, ...] | None
    """Logs of the sum of squared probabilities, shaped like ``logprobs``; if asked for."""
    entropies: tuple[Tensor, ...] | None
    """Entropies of what may follow, in nats, with gradient, shaped like ``logprobs``; if asked for."""
    embeddings: Tensor | None
    """``(R, D)`` mean state of the last layer over the response tokens, without gradient; if asked for."""


@dataclass(frozen=True)
class DecodeStep:
    """The next t tokens of B rows, when rows are written: the prompts first, then one token at a time."""

    tokens: Tensor  # (B, t) int64
    attention_mask: Tensor | dict[str, Tensor] | None
    """``(B, past + t)`` bool, True on real tokens; ``None`` if all are. For a single token also ``(B, 1, 1, columns)``,
    True on what it sees, for all layers or by the kind of layer."""
    position_ids: Tensor  # (B, t) int64
    cache: Cache
    """Keys and values of the past; those of these tokens are added to it."""


class PolicyModel(nn.Module):
    """A causal language model that gives log-probabilities of rows.

    Args:
        hf: a Transformers causal language model; its output projection becomes a :class:`LogprobHead`.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self._logits = backbones.logit_options(hf.config)
        self._adapters: tuple[PeftModel, ...] = ()
        self.grown = False
        """Whether there are more tokens than the embedding on disk has rows for."""
        head = hf.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ModelError(f"{type(hf).__name__}: the output projection is {type(head).__name__}, expected a Linear")
        head.__class__ = LogprobHead

    def forward(
        self,
        buckets: Sequence[LengthBucket] = (),
        *,
        decode: DecodeStep | None = None,
        with_square_sums: bool = False,
        with_entropies: bool = False,
        with_embeddings: bool = False,
        temperature: float = 1.0,
    ) -> PolicyOutput | Tensor:
        """Ask about right-padded length buckets, one after the other; or with ``decode`` for ``(B, V)`` float32 logits.

        ``temperature`` divides the logits, as sampling does.
        """
        if decode is not None:
            return self._next_logits(decode)
        asked = {"with_square_sums": with_square_sums, "with_entropies": with_entropies}
        options = {**self._logits, **asked, "temperature": temperature}
        blocks = list(last_states(self.hf, *token_blocks(buckets)))
        found = self._next_logprobs(blocks, buckets, options)
        masks = [bucket.response_mask for bucket in buckets]
        return PolicyOutput(
            logprobs=_by_bucket(found.logprobs, masks),
            square_sums=None if found.square_sums is None else _by_bucket(found.square_sums, masks),
            entropies=None if found.entropies is None else _by_bucket(found.entropies, masks),
            embeddings=_response_means(blocks, masks) if with_embeddings else None,
        )

    def _next_logprobs(
        self, blocks: Sequence[Tensor], buckets: Sequence[LengthBucket], options: dict[str, Any]
    ) -> TokenLogprobs:
        """Log-probabilities of all buckets in one row: each call has a gradient of the size of the projection."""
        states = torch.cat([states[:, :-1].flatten(0, 1) for states in blocks])
        tokens = torch.cat([bucket.tokens[:, 1:].flatten() for bucket in buckets])
        mask = torch.cat([bucket.response_mask[:, 1:].flatten() for bucket in buckets])
        options = {**options, "places": _response_places(buckets)}
        return self.hf.get_output_embeddings()(states[None], tokens[None], mask[None], options)

    def _next_logits(self, step: DecodeStep) -> Tensor:
        """``(B, V)`` logits of the token after the last of ``step``."""
        backbone = backbone_of(self.hf)
        mask, cache = step.attention_mask, {"past_key_values": step.cache}
        if "cache_params" in inspect.signature(backbone.forward).parameters:  # Mamba: its state has no places to mask
            mask, cache = None if step.tokens.shape[1] == 1 else mask, {"cache_params": step.cache}
        states = backbone(
            input_ids=step.tokens, attention_mask=mask, position_ids=step.position_ids, use_cache=True, **cache
        ).last_hidden_state
        return self.hf.get_output_embeddings()(states[:, -1], None, None, self._logits)

    @property
    def adapters(self) -> "tuple[PeftModel, ...]":
        """The peft wrapper under LoRA; else nothing."""
        return self._adapters

    @property
    def has_adapters(self) -> bool:
        return bool(self._adapters)

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base model under LoRA: adapters are switched off inside. What is trained stays the same: peft would
        switch on all of the active adapter, and off every other, when it comes back.
        """
        trained = [parameter.requires_grad for parameter in self.parameters()]
        try:
            with contextlib.ExitStack() as stack:
                for adapter in self._adapters:
                    stack.enter_context(adapter.disable_adapter())
                yield
        finally:
            for parameter, wanted in zip(self.parameters(), trained, strict=True):
                parameter.requires_grad_(wanted)

    @contextlib.contextmanager
    def as_plain(self) -> Iterator[None]:
        """Make ``hf`` the plain Transformers model inside the block; this object cannot be asked there."""
        head = self.hf.get_output_embeddings()
        head.__class__ = nn.Linear
        try:
            yield
        finally:
            head.__class__ = LogprobHead

    def plain(self) -> PreTrainedModel:
        """The Transformers model with its own output projection again. Ends the use of this object."""
        self.hf.get_output_embeddings().__class__ = nn.Linear
        return self.hf

    def merged(self) -> PreTrainedModel:
        """The model of :meth:`plain`, with adapters merged into the weights."""
        hf = self.plain()
        for adapter in self._adapters:
            merge_adapters(adapter)
        return hf

    def save(self, folder: Path, lora: Literal["merged", "adapter"]) -> None:
        """Write a folder that plain ``AutoModelForCausalLM`` opens. Ends the use of this object.

        An adapter of a model that was grown is saved with the whole embedding, and opened by
        :func:`rlhf.models.adapters.with_adapter`: plain Transformers does not grow the base by itself.
        """
        if self.has_adapters and lora == "adapter":
            adapter = self._adapters[0]
            settings = adapter.peft_config[adapter.active_adapter]
            settings.base_model_name_or_path = absolute_base(str(self.hf.name_or_path))
            with self.as_plain():
                adapter.save_pretrained(str(folder), save_embedding_layers=self.grown)
            if self.hf.generation_config is not None:
                self.hf.generation_config.save_pretrained(folder)
        else:
            self.merged().save_pretrained(folder)


class LogprobHead(nn.Linear):
    """An output projection that gives log-probabilities of responses, never the logits of whole rows.

    A module of its own, so that ZeRO-3 gathers its weight for the forward and for the backward pass.
    """

    def forward(  # type: ignore[override]  # it takes a Linear's place, and PolicyModel alone calls it
        self, states: Tensor, tokens: Tensor | None, response_mask: Tensor | None, options: dict[str, Any]
    ) -> TokenLogprobs | Tensor:
        """``(B, T)`` log-probabilities of the tokens that follow ``(B, T, D)`` states.

        Without tokens: the ``(R, V)`` logits after ``(R, D)`` states.
        """
        if tokens is None or response_mask is None:
            return head_logits(states, self.weight, head_bias=self.bias, **options)
        return token_logprobs(states, self.weight, tokens, response_mask, head_bias=self.bias, **options)


def policy_of(model: Frozen) -> PolicyModel:
    """The policy that an engine trains or a frozen placement holds."""
    assert isinstance(model.module, PolicyModel)
    return model.module


def _response_places(buckets: Sequence[LengthBucket]) -> Tensor:
    """Where in the row of all buckets the responses are."""
    starts = itertools.accumulate((len(bucket.tokens) * (bucket.tokens.shape[1] - 1) for bucket in buckets), initial=0)
    return torch.cat([bucket.places() + start for bucket, start in zip(buckets, starts, strict=False)])


def _by_bucket(values: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``(R, T - 1)`` of each bucket, from all in one row."""
    shapes = [(mask.shape[0], mask.shape[1] - 1) for mask in masks]
    parts = values[0].split([rows * places for rows, places in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _response_means(blocks: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """``(R, D)`` float32 means over response tokens of the rows of all buckets, no gradient; 0 for a row without."""
    means = []
    for states, mask in zip(blocks, masks, strict=True):
        weights = mask.float() / mask.sum(dim=1, keepdim=True).clamp_min(1)
        means.append(torch.einsum("rt,rtd->rd", weights, states.detach().float()))
    return torch.cat(means)
