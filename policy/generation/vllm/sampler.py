"""The sampler whose responses come from vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.generation.api import Response
from policy.generation.options import SamplingConfig
from policy.generation.stopping import StopRule, tail_of
from policy.generation.vllm.client import WireRow
from policy.generation.vllm.pool import Answer, EnginePool
from policy.generation.vllm.process import Launch
from rlhf.core.errors import ConfigError, ModelError
from rlhf.engine.ranks import Ranks

SEEDS = 2**63
"""vLLM takes seeds below this."""


@dataclass(frozen=True)
class Share:
    """The rows of all ranks, and which of them are those of this one."""

    rows: Sequence[WireRow]
    first: int
    count: int


class VllmSampler:
    """A sampler of engines; see :class:`policy.generation.api.Sampler`. Every rank must call it, be it without prompts.

    One seed gives one response again, but not the one that the own sampler draws from it. Log-probabilities are those
    of the tempered logits, as the protocol says, or NaN where vLLM does not tell them: with top_k or top_p at another
    temperature than 1. Entropies it does not tell: they are NaN.

    Args:
        ranks: who share the engines.
        pool: on the main rank; ``None`` on the others.
        config: how to sample.
        eos_token_ids: tokens that end a response.
        tokenizer: for stop strings.
        repetition_penalty: see :class:`policy.generation.repetition.RepetitionPenalty`.
        logprobs: whether to ask for log-probabilities; they are NaN without.
        renew: called on every rank where an engine was lost and lacks its weights; see
            :meth:`policy.generation.vllm.weights.WeightPush.renew`.
    """

    def __init__(
        self,
        ranks: Ranks,
        pool: EnginePool | None,
        config: SamplingConfig,
        *,
        eos_token_ids: Sequence[int],
        tokenizer: Any,
        repetition_penalty: float = 1.0,
        logprobs: bool = True,
        renew: Callable[[], None] | None = None,
    ) -> None:
        self._ranks, self._pool, self._config, self._renew = ranks, pool, config, renew
        self._stop = StopRule(eos_token_ids, config.stop, tokenizer)
        self._settings = vllm_settings(config, eos_token_ids, repetition_penalty) | {
            "logprobs": 0 if logprobs else None
        }
        self._told = logprobs and tells_logprobs(config, repetition_penalty)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        advance: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """One response to each prompt; see :meth:`policy.generation.api.Sampler.generate`.

        Raises:
            ValueError: if there are not as many seeds as prompts, or a prompt is empty.
            ModelError: if log-probabilities are not finite, or an engine refuses.
            TrainingStopped: if engines are lost too often.
        """
        return self.drawn(self.gather(prompts, seeds), advance)

    def drawn(self, share: "Share", advance: Callable[[int], None] | None = None) -> list[Response]:
        """The responses to the rows of this rank. Every rank must call it."""
        answers: list[Answer | None] = []

        def ask() -> list[Answer | None]:
            return self.ask(share, advance, answers)

        answers = self._ranks.on_main(ask)
        while None in answers:
            assert self._renew is not None, "weights are sent as a stream"
            self._renew()
            answers = self._ranks.on_main(ask)
        return self.responses(share, answers)

    def gather(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> "Share":
        """What all ranks ask for."""
        if len(seeds) != len(prompts) or not all(map(len, prompts)):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: expected one each, and no empty prompt")
        mine = [(np.asarray(prompt).tolist(), seed % SEEDS) for prompt, seed in zip(prompts, seeds, strict=True)]
        parts = self._ranks.gather_objects(mine)
        return Share([row for part in parts for row in part], sum(map(len, parts[: self._ranks.rank])), len(mine))

    def responses(self, share: "Share", answers: Sequence[Answer | None]) -> list[Response]:
        """Those to the rows of this rank."""
        mine = answers[share.first : share.first + share.count]
        assert None not in mine, "an engine was lost with its weights: drawn() asks again"
        return [self._response(answer) for answer in mine if answer is not None]

    def ask(
        self, share: "Share", advance: Callable[[int], None] | None = None, known: Sequence[Answer | None] = ()
    ) -> list[Answer | None]:
        """What the engines say, see :meth:`EnginePool.generate`; the main rank alone can ask them."""
        rows = share.rows
        if not rows:
            return []
        pool = self._pool
        assert pool is not None
        longest = max(len(tokens) for tokens, _ in rows) + self._config.max_new_tokens
        if longest > pool.max_model_tokens:
            raise ConfigError(
                f"a prompt and max_new_tokens = {self._config.max_new_tokens} come to {longest} tokens, the vLLM "
                f"engine takes {pool.max_model_tokens}: lower max_new_tokens, or raise vllm.max_model_tokens"
            )

        def advance_each(count: int) -> None:
            if advance is not None:  # told of its own rows: the ranks are alike
                advance(-(-count // self._ranks.world_size))

        answers = pool.generate(rows, self._settings, advance_each, known)
        told = [answer for answer in answers if answer is not None and "logprobs" in answer]
        bad = sum(None in answer["logprobs"] or not answer["tokens"] for answer in told)
        if bad:
            raise ModelError(
                f"{bad} of {len(answers)} responses of vLLM have log-probabilities that are not finite: the weights "
                "are broken"
            )
        return answers

    def _response(self, answer: Answer) -> Response:
        tokens = np.array(answer["tokens"], np.int64)
        count, ended = self._end_of(tokens, answer["ended"])
        unknown = np.full(count, np.nan, np.float32)
        logprobs = np.array(answer["logprobs"][:count], np.float32) if self._told else unknown
        return Response(tokens=tokens[:count], logprobs=logprobs, entropies=unknown, ended=ended)

    def _end_of(self, tokens: NDArray[np.int64], ended: bool) -> tuple[int, bool]:
        """How many tokens count, and whether the last one ends the response: as the own sampler sees stop strings."""
        if self._config.stop:
            for count in range(1, len(tokens) + 1):
                if self._stop.ends([tokens[:count]])[0]:
                    return count, True
        return len(tokens), ended


def vllm_settings(config: SamplingConfig, eos_token_ids: Sequence[int], repetition_penalty: float) -> dict[str, Any]:
    """The sampling in vLLM's words. Its greedy decoding is asked for by temperature 0."""
    greedy = config.top_k == 1
    return {
        "max_tokens": config.max_new_tokens,
        "temperature": 0.0 if greedy else config.temperature,
        "top_p": 1.0 if greedy else config.top_p,
        "top_k": 0 if greedy else config.top_k,
        "repetition_penalty": repetition_penalty,
        "stop_token_ids": list(map(int, eos_token_ids)),
        "stop": list(config.stop),
        "stop_tail": tail_of(config.stop),
    }


def draws_from_all(config: SamplingConfig) -> bool:
    """Whether every token may be drawn."""
    return config.top_k == 0 and config.top_p == 1.0


def tells_logprobs(config: SamplingConfig, repetition_penalty: float = 1.0) -> bool:
    """Whether vLLM tells log-probabilities before top_k and top_p: of tempered logits it does only where all may be
    drawn, of the logits themselves always."""
    return draws_from_all(config) or config.temperature == repetition_penalty == 1.0


def launch_of(config: SamplingConfig, *, dtype: Any, folder: Path, tokenizer: Path) -> Launch:
    """How engines for this sampling are started; ``folder`` for their logs."""
    return Launch(
        config=config.vllm,
        dtype=str(dtype).removeprefix("torch."),
        rows=config.batch_rows,
        logprobs="processed_logprobs" if draws_from_all(config) else "raw_logprobs",
        folder=folder,
        tokenizer=tokenizer,
    )
