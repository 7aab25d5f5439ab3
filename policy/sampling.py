"""Responses of a plain language model to prompts, for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt, Le
from transformers import PreTrainedModel

from rlhf.core.errors import DataError
from rlhf.data.batching import Row
from rlhf.data.templates import ChatFormat
from rlhf.train.progress import Progress


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are drawn."""

    samples: Annotated[int, Gt(0)] = 4
    """Responses to each prompt."""
    max_new_tokens: Annotated[int, Gt(0)] = 128
    """A response that has not ended by then is cut there."""
    temperature: Annotated[float, Gt(0)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    batch_rows: Annotated[int, Gt(0)] = 64
    """Responses drawn together; part of the seeding."""
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One response."""

    prompt: int
    """Place of its prompt in the list."""
    row: Row
    """Prompt and response as tokens, the end token included if it was drawn."""
    text: str
    ended: bool
    """Whether the model ended it, rather than the limit."""


@torch.inference_mode()
def sample_responses(
    model: PreTrainedModel, chat: ChatFormat, prompts: Sequence[str], settings: SamplingSettings, progress: Progress
) -> list[Sample]:
    """Draw ``settings.samples`` responses to each prompt, in the order of the prompts.

    Prompts are batched by length; one seed gives one result on one machine.

    Raises:
        DataError: if there is no prompt.
    """
    if not prompts:
        raise DataError("there are no prompts to answer")
    texts = [chat.render_prompt(({"role": "user", "content": prompt},)) for prompt in prompts]
    encoded = chat.tokenizer(texts, add_special_tokens=False)["input_ids"]
    jobs = sorted((len(encoded[p]), p) for p in range(len(prompts)) for _ in range(settings.samples))
    found: list[Sample] = []
    for start in range(0, len(jobs), settings.batch_rows):
        places = [place for _, place in jobs[start : start + settings.batch_rows]]
        torch.manual_seed(settings.seed * 1_000_003 + start)
        found += _sample_batch(model, chat.tokenizer, [encoded[place] for place in places], places, settings)
        progress.advance(len(found), {})
    return sorted(found, key=lambda sample: sample.prompt)


def _sample_batch(
    model: PreTrainedModel, tokenizer: Any, rows: list[list[int]], places: list[int], settings: SamplingSettings
) -> list[Sample]:
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for place, row in enumerate(rows):
        tokens[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    output = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    samples = []
    for prompt, row, drawn in zip(places, rows, output[:, width:].tolist(), strict=True):
        ended = tokenizer.eos_token_id in drawn
        response = drawn[: drawn.index(tokenizer.eos_token_id) + 1] if ended else drawn
        whole = np.array(row + response, np.int64)
        text = tokenizer.decode(response, skip_special_tokens=True).strip()
        samples.append(Sample(prompt, Row(whole, np.arange(len(whole)) >= len(row)), text, ended))
    return samples
