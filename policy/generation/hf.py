"""Sampling with the policy's own Transformers model: left-padded batches, cached keys, finished rows leave."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from policy.generation.api import Response, row_uniforms
from policy.generation.attention import grouped_attention
from policy.generation.cache import expand, new_cache, shrink
from policy.generation.draw import Drawn, draw_tokens
from policy.generation.options import SamplingConfig
from policy.generation.repetition import RepetitionPenalty
from policy.generation.stopping import StopRule
from policy.model import DecodeStep, policy_of
from rlhf.core.errors import ModelError
from rlhf.engine.frozen import Frozen
from rlhf.train.batches import asking


class HfSampler:
    """A sampler on top of Transformers; see :class:`policy.generation.api.Sampler`.

    Prompts are batched by length. A batch computes each different prompt once, then one token a row at a time;
    rows that have ended cost nothing any more.

    Args:
        model: its module is a :class:`policy.model.PolicyModel`; weights may change between calls.
        config: how tokens are drawn.
        eos_token_ids: tokens that end a response.
        pad_token_id: any token; it is never seen.
        tokenizer: for stop strings; not needed without.
        repetition_penalty: see :class:`RepetitionPenalty`; 1 for none. The log-probabilities of responses are then
            those under the changed logits.
        synced: the model is sharded, so that a forward needs all ranks: they stay together, forward by forward,
            and a rank that is done makes forwards for company. Every rank must then call :meth:`generate`, be it
            without prompts.
    """

    def __init__(
        self,
        model: Frozen,
        config: SamplingConfig,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        tokenizer: Any | None = None,
        repetition_penalty: float = 1.0,
        synced: bool = False,
    ) -> None:
        self._model, self._config, self._penalty = model, config, repetition_penalty
        self._stop = StopRule(eos_token_ids, config.stop, tokenizer)
        self._pad, self._synced = pad_token_id, synced
        self._device = model.ranks.device

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        advance: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """One response to each prompt; see :meth:`policy.generation.api.Sampler.generate`.

        Raises:
            ValueError: if there are not as many seeds as prompts, or a prompt is empty.
            ModelError: if the model's logits are not finite.
        """
        rows = [np.asarray(prompt, np.int64) for prompt in prompts]
        if len(seeds) != len(rows) or not all(map(len, rows)):
            raise ValueError(f"{len(rows)} prompts, {len(seeds)} seeds: expected one each, and no empty prompt")
        order = sorted(range(len(rows)), key=lambda place: (len(rows[place]), rows[place].tobytes()))
        found: dict[int, Response] = {}
        with asking(self._model), grouped_attention():
            for start in range(0, len(order), self._config.batch_rows):
                places = order[start : start + self._config.batch_rows]
                responses = self._decode([rows[place] for place in places], [seeds[place] for place in places])
                found.update(zip(places, responses, strict=True))
                if advance is not None:
                    advance(len(found))
            if self._synced:
                self._keep_company()
        _check_finite(found.values())
        return [found[place] for place in range(len(rows))]

    def _decode(self, prompts: list[NDArray[np.int64]], seeds: list[int]) -> list[Response]:
        """Responses to the prompts of one batch."""
        config = self._config
        cache = new_cache(policy_of(self._model).hf.config, room=config.max_new_tokens)
        rows, logits = self._read_prompts(prompts, seeds, cache)
        penalty = None
        if self._penalty != 1:
            penalty = RepetitionPenalty(self._penalty, prompts, logits.shape[1], self._device)
        for step in range(config.max_new_tokens):
            if penalty is not None:
                logits = penalty.apply(logits)
            drawn = draw_tokens(
                logits,
                rows.uniforms[:, step],
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
            )
            going_on = rows.add(drawn, self._stop)
            if not len(going_on) or step + 1 == config.max_new_tokens:
                break
            tokens = drawn.tokens
            if penalty is not None:
                penalty.add(tokens)
            if len(going_on) < len(tokens):
                source = _closed_up(going_on)
                rows.keep(source)
                if penalty is not None:
                    penalty.keep(source)
                shrink(cache, source, self._device)
                tokens = tokens[torch.tensor(source, device=self._device)]
            logits = self._ask(tokens[:, None], rows.mask, rows.lengths[:, None] + step, cache, written=step + 1)
        return rows.responses()

    def _read_prompts(self, prompts: list[NDArray[np.int64]], seeds: list[int], cache: Cache) -> tuple["_Rows", Tensor]:
        """Rows that have written nothing yet, and the ``(B, V)`` logits of their first tokens."""
        first: dict[bytes, int] = {}
        source = [first.setdefault(prompt.tobytes(), len(first)) for prompt in prompts]
        distinct = [prompts[source.index(place)] for place in range(len(first))]
        width = max(map(len, distinct))
        tokens = np.full((len(distinct), width), self._pad, np.int64)
        real = np.zeros(tokens.shape, bool)
        for place, prompt in enumerate(distinct):
            tokens[place, width - len(prompt) :] = prompt
            real[place, width - len(prompt) :] = True
        positions = np.maximum(real.cumsum(axis=1) - 1, 0)
        places = torch.tensor(source, device=self._device)
        mask = None if real.all() else torch.from_numpy(real).to(self._device)
        logits = self._ask(torch.from_numpy(tokens), mask, torch.from_numpy(positions), cache)
        expand(cache, places)
        return _Rows(prompts, seeds, self._config, None if mask is None else mask[places], self._device), logits[places]

    def _ask(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache, *, written: int = 0) -> Tensor:
        """``(B, V)`` logits of what follows ``(B, t)`` tokens, the last of ``written`` ones after the prompts."""
        if self._synced:
            self._model.ranks.any(True)
        if mask is not None:  # what was written after the prompts is never masked
            mask = F.pad(mask, (0, written), value=True)
        step = DecodeStep(
            tokens=tokens.to(self._device),
            attention_mask=mask,
            position_ids=positions.to(self._device),
            cache=cache,
        )
        return self._model.forward(decode=step)

    def _keep_company(self) -> None:
        """Forwards that give the others their weights, until nobody needs one."""
        while self._model.ranks.any(False):
            one = torch.zeros((1, 1), dtype=torch.long, device=self._device)
            cache = new_cache(policy_of(self._model).hf.config, room=0)
            self._model.forward(decode=DecodeStep(tokens=one, attention_mask=None, position_ids=one, cache=cache))


class _Rows:
    """The rows of a batch that go on, and all that was written.

    Attributes:
        uniforms: ``(B, max_new_tokens)`` float64 of the B rows that go on.
        mask: ``(B, P)`` bool, True on the prompt; ``None`` if no prompt is padded.
        lengths: ``(B,)`` int64 tokens of the prompts.
    """

    def __init__(
        self,
        prompts: list[NDArray[np.int64]],
        seeds: list[int],
        config: SamplingConfig,
        mask: Tensor | None,
        device: torch.device,
    ) -> None:
        uniforms = np.stack([row_uniforms(seed, config.max_new_tokens) for seed in seeds])
        self.uniforms = torch.from_numpy(uniforms).to(device)
        self.mask = mask
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._places = np.arange(len(prompts))  # in the batch, of the rows that go on
        self._index = torch.arange(len(prompts), device=device)  # the same
        self._counts = np.zeros(len(prompts), np.int64)
        self._ended = np.zeros(len(prompts), bool)
        self._tokens = np.zeros(uniforms.shape, np.int64)
        self._logprobs, self._entropies = torch.zeros((2, *uniforms.shape), device=device)

    def add(self, drawn: Drawn, stop: StopRule) -> NDArray[np.int64]:
        """Append a token to each row that goes on; which of them go on after it."""
        places, step = self._places, int(self._counts[self._places[0]])
        self._tokens[places, step] = drawn.tokens.cpu().numpy()
        self._logprobs[self._index, step] = drawn.logprobs
        self._entropies[self._index, step] = drawn.entropies
        self._counts[places] += 1
        ended = stop.ends(self._tokens[places, : step + 1])
        self._ended[places] = ended
        return np.flatnonzero(~ended)

    def keep(self, source: list[int]) -> None:
        """Row k that goes on is what row ``source[k]`` was."""
        index = torch.tensor(source, device=self.lengths.device)
        self._places, self._index = self._places[source], self._index[index]
        self.uniforms, self.lengths = self.uniforms[index], self.lengths[index]
        self.mask = None if self.mask is None else self.mask[index]

    def responses(self) -> list[Response]:
        """Responses in the order of the batch."""
        logprobs, entropies = self._logprobs.cpu().numpy(), self._entropies.cpu().numpy()
        return [
            Response(
                tokens=self._tokens[row, :count].copy(),
                logprobs=logprobs[row, :count].copy(),
                entropies=entropies[row, :count].copy(),
                ended=bool(self._ended[row]),
            )
            for row, count in enumerate(self._counts)
        ]


def _closed_up(going_on: NDArray[np.int64]) -> list[int]:
    """The rows in ``going_on`` in an order in which most keep their place: the last ones fill the gaps."""
    count = len(going_on)
    source = np.arange(count)
    gaps = np.setdiff1d(source, going_on)
    source[gaps] = going_on[going_on >= count]
    return source.tolist()


def _check_finite(responses: Any) -> None:
    bad = sum(not np.isfinite(response.logprobs).all() for response in responses)
    if bad:
        raise ModelError(f"{bad} responses were drawn from logits that are not finite: the model's weights are broken")
