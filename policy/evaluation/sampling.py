"""Responses of a language model to prompts, for evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from policy.evaluation.options import SamplingSettings
from policy.generation.api import Sampler, row_seed
from policy.generation.hf import HfSampler
from policy.generation.vllm.training import Engines
from rlhf.core.errors import DataError
from rlhf.data.batching import Row
from rlhf.data.messages import Asked, as_messages
from rlhf.data.templates import ChatFormat
from rlhf.engine.frozen import Frozen


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    prompt: int
    """Place of its prompt in the list."""
    row: Row
    """Prompt and response as tokens, the end token included if it was drawn."""
    text: str
    ended: bool
    """Whether the model ended it, rather than the limit."""
    logprobs: NDArray[np.float32]
    """``(T,)`` of the response's tokens, in nats, at the temperature that they were drawn at."""


def sample_responses(
    model: Frozen,
    chat: ChatFormat,
    prompts: Sequence[Asked],
    settings: SamplingSettings,
    advance: Callable[[int], None] | None = None,
    *,
    first: int = 0,
    engines: Engines | None = None,
) -> list[Sample]:
    """Draw ``settings.samples`` responses to each prompt, in the order of the prompts.

    The seed, the place of the prompt and the number of the sample decide what is drawn.

    Args:
        model: its module is a :class:`policy.model.PolicyModel`.
        chat: tokenizer, template and ends of the model.
        prompts: texts of users, or conversations.
        settings: how to draw.
        advance: told after each batch how many responses there are.
        first: the place of the first prompt, for a list that is answered in parts.
        engines: what writes in the place of the model; every rank must then call this, be it without prompts.
    Raises:
        DataError: if there is no prompt.
    """
    if not prompts and engines is None:
        raise DataError("there are no prompts to answer")
    jobs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(settings.samples)]
    seeds = [row_seed(settings.seed, first + prompt, sample) for prompt, sample in jobs]
    samples = draw(model, chat, [prompts[prompt] for prompt, _ in jobs], seeds, settings, advance, engines)
    return [replace(sample, prompt=prompt) for sample, (prompt, _) in zip(samples, jobs, strict=True)]


def draw(
    model: Frozen,
    chat: ChatFormat,
    prompts: Sequence[Asked],
    seeds: Sequence[int],
    settings: SamplingSettings,
    advance: Callable[[int], None] | None = None,
    engines: Engines | None = None,
) -> list[Sample]:
    """One response to each prompt, from the seed of each; see :func:`sample_responses`."""
    tokenizer = chat.tokenizer
    places: dict[str, int] = {}
    texts = [chat.render_prompt(as_messages(prompt)) for prompt in prompts]
    for text in texts:
        places.setdefault(text, len(places))
    tokenized = tokenizer([*places], add_special_tokens=False)["input_ids"] if places else []
    distinct = [np.array(tokens, np.int64) for tokens in tokenized]
    encoded = [distinct[places[text]] for text in texts]
    penalty = settings.repetition_penalty
    sampler: Sampler
    if engines is not None:
        sampler = engines.sampler(settings, eos_token_ids=chat.end_token_ids, repetition_penalty=penalty)
    else:
        sampler = HfSampler(
            model,
            settings,
            eos_token_ids=chat.end_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,
            repetition_penalty=penalty,
        )
    samples = []
    for place, response in enumerate(sampler.generate(encoded, seeds, advance)):
        whole = np.concatenate([encoded[place], response.tokens])
        text = tokenizer.decode(response.tokens, skip_special_tokens=True).strip()
        row = Row(whole, np.arange(len(whole)) >= len(encoded[place]))
        samples.append(Sample(place, row, text, response.ended, response.logprobs))
    return samples
