"""The responses of one step, the same on every rank, and what models say about each of their tokens.

Per-token columns are aligned with the response: ``(N, W)``, place j is the response's token j, W the longest of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.generation.api import Response, Sampler, row_seed
from rlhf.core.errors import ModelError
from rlhf.core.files import digest
from rlhf.core.masking import length_mask
from rlhf.core.packing import collect
from rlhf.data.batching import Batch, Item, ItemSource, Row
from rlhf.data.prompts import Prompt
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.frozen import Frozen
from rlhf.engine.ranks import Ranks
from rlhf.train.batches import BatchMaker, asking


@dataclass(frozen=True)
class Rollouts:
    """N prompts with one response each; an :class:`rlhf.data.batching.ItemSource` of single rows."""

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    texts: Sequence[str]
    """The responses as text, without special tokens."""
    groups: Tensor
    """``(N,)`` int64; equal for the responses to one prompt."""
    staleness: int = 0
    """How many updates the weights that wrote the oldest of them are behind those that learn from them."""

    def __len__(self) -> int:
        return len(self.responses)

    def of_groups(self, groups: Sequence[int]) -> tuple["Rollouts", Tensor]:
        """The responses of these groups, numbered anew in their order, and their ``(n,)`` places among all."""
        places = torch.cat([(self.groups == group).nonzero().flatten() for group in groups])
        counts = torch.tensor([int((self.groups == group).sum()) for group in groups])
        chosen = places.tolist()
        kept = Rollouts(
            [self.prompts[place] for place in chosen],
            [self.responses[place] for place in chosen],
            [self.texts[place] for place in chosen],
            torch.arange(len(groups)).repeat_interleave(counts),
            self.staleness,
        )
        return kept, places

    def item(self, index: int) -> Item:
        prompt, response = self.prompts[index].tokens, self.responses[index].tokens
        tokens = np.concatenate([prompt, response])
        return Item(self.row_ids[index], (Row(tokens, np.arange(len(tokens)) >= len(prompt)),))

    @cached_property
    def lengths(self) -> np.ndarray:
        pairs = zip(self.prompts, self.responses, strict=True)
        return np.array([[len(prompt.tokens) + len(response.tokens)] for prompt, response in pairs])

    @cached_property
    def fingerprint(self) -> str:
        return digest(*(response.tokens.tobytes() for response in self.responses))

    @cached_property
    def row_ids(self) -> list[str]:
        """The prompt's file and line, and which response to it."""
        seen: dict[str, int] = {}
        names = []
        for prompt in self.prompts:
            seen[prompt.row_id] = seen.get(prompt.row_id, -1) + 1
            names.append(f"{prompt.row_id}#{seen[prompt.row_id]}")
        return names

    @cached_property
    def response_lengths(self) -> Tensor:
        """``(N,)`` int64 tokens, the end token included."""
        return torch.tensor([len(response.tokens) for response in self.responses])

    @cached_property
    def mask(self) -> Tensor:
        """``(N, W)`` bool, True on response tokens."""
        return length_mask(self.response_lengths, int(self.response_lengths.max()))

    @cached_property
    def ended(self) -> Tensor:
        """``(N,)`` bool: ended by the model, not by the limit."""
        return torch.tensor([response.ended for response in self.responses])

    @cached_property
    def sampler_logprobs(self) -> Tensor:
        """``(N, W)`` float32: what the sampler says of its own tokens."""
        return self._column([response.logprobs for response in self.responses])

    @cached_property
    def sampler_entropies(self) -> Tensor:
        """``(N, W)`` float32 entropies of what the sampler drew its tokens from."""
        return self._column([response.entropies for response in self.responses])

    def _column(self, values: Sequence[NDArray[np.float32]]) -> Tensor:
        column = torch.zeros(self.mask.shape)
        column[self.mask] = torch.from_numpy(np.concatenate(values))
        return column


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """All of ``parts``, whose groups stay apart."""
    starts = np.cumsum([0, *(int(part.groups.max()) + 1 for part in parts)])
    return Rollouts(
        [prompt for part in parts for prompt in part.prompts],
        [response for part in parts for response in part.responses],
        [text for part in parts for text in part.texts],
        torch.cat([part.groups + int(start) for part, start in zip(parts, starts, strict=False)]),
        max(part.staleness for part in parts),
    )


def closed(rollouts: Rollouts, chat: ChatFormat, *, cut: bool) -> Rollouts:
    """Rollouts with the end token of ``chat`` behind each response that has none, as reward models know texts.

    Responses that a stop string ended have none, nor have those that ran into the limit: with ``cut`` these stay as
    they are.
    """
    end = np.array([chat.tokenizer.convert_tokens_to_ids(chat.ending.token)])

    def close(response: Response) -> Response:
        if response.tokens[-1] in chat.end_token_ids or (cut and not response.ended):
            return response
        return replace(
            response,
            tokens=np.concatenate([response.tokens, end]),
            logprobs=np.append(response.logprobs, np.float32(0)),
            entropies=np.append(response.entropies, np.float32(0)),
        )

    return replace(rollouts, responses=[close(response) for response in rollouts.responses])


class Reencoded:
    """Rollouts as text, shown and tokenized as ``chat`` does it. An ItemSource.

    Each ends with an end token; with ``cut``, not those that ran into the limit. Where the template drops or rewrites
    part of a response (thoughts, white space), the response is put behind the prompt as it is.

    Raises:
        ModelError: if the template cannot show one of the prompts.
    """

    def __init__(self, rollouts: Rollouts, chat: ChatFormat, *, cut: bool) -> None:
        rows = zip(rollouts.prompts, rollouts.texts, rollouts.responses, strict=True)
        try:
            rendered = [_shown(chat, prompt, text, cut=cut and not response.ended) for prompt, text, response in rows]
        except TemplateFault as error:
            raise ModelError(f"the chat template ({chat.origin}) cannot show a prompt: {error}") from error
        self._rows = [Row(tokens, np.arange(len(tokens)) >= start) for tokens, start in chat.tokenize(rendered)]
        self._names = rollouts.row_ids
        self.lengths = np.array([[len(row.tokens)] for row in self._rows])
        self.fingerprint = rollouts.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Item:
        return Item(self._names[index], (self._rows[index],))


def _shown(chat: ChatFormat, prompt: Prompt, text: str, *, cut: bool) -> tuple[str, str]:
    """What stands before a response, and the whole text; with ``cut``, without what ends a response."""
    before, whole = chat.render_written(prompt.messages, text)
    return before, whole.removesuffix(chat.ending.token).rstrip() if cut and text else whole


def roll_out(
    sampler: Sampler,
    ranks: Ranks,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    samples: int,
    seed: Sequence[int | str],
    advance: Callable[[int], None] | None = None,
) -> Rollouts:
    """``samples`` responses to each prompt, shared out over ranks by length and gathered on all of them.

    A response is drawn from the seed of its row: who draws it, and beside whom, does not matter.
    """
    rows = _rows(prompts, samples)
    own = _own_rows(ranks, prompts, rows)
    drawn = sampler.generate(*rollout_share(ranks, prompts, samples, seed), advance)
    found: dict[int, Response] = {}
    for part in ranks.gather_objects(list(zip(own, drawn, strict=True))):
        found.update(part)
    responses = [found[row] for row in range(len(rows))]
    texts = tokenizer.batch_decode([response.tokens for response in responses], skip_special_tokens=True)
    return Rollouts(
        [prompts[place] for place, _ in rows],
        responses,
        [text.strip() for text in texts],
        torch.tensor([place for place, _ in rows]),
    )


def rollout_share(
    ranks: Ranks, prompts: Sequence[Prompt], samples: int, seed: Sequence[int | str]
) -> tuple[list[NDArray[np.int64]], list[int]]:
    """What :func:`roll_out` asks the sampler for on this rank: token ids of prompts, and seeds."""
    rows = _rows(prompts, samples)
    own = _own_rows(ranks, prompts, rows)
    return [prompts[rows[row][0]].tokens for row in own], [row_seed(*seed, *rows[row]) for row in own]


def _rows(prompts: Sequence[Prompt], samples: int) -> list[tuple[int, int]]:
    """Prompt and sample of each response."""
    return [(place, sample) for place in range(len(prompts)) for sample in range(samples)]


def _own_rows(ranks: Ranks, prompts: Sequence[Prompt], rows: Sequence[tuple[int, int]]) -> list[int]:
    """The responses that this rank is to draw."""
    by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].tokens))
    mine = set(by_length[ranks.rank :: ranks.world_size])
    return [row for row, (place, _) in enumerate(rows) if place in mine]


def by_response(outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    """``(B, W)`` from what a model says of a batch's buckets, each ``(R, T - 1)``: place t is token t + 1.

    W is the longest response of the batch; places behind a response are 0. Gradients flow.
    """
    width = max(1, *(bucket.longest() for bucket in batch.buckets))
    rows = []
    for values, bucket in zip(outputs, batch.buckets, strict=True):
        counts = bucket.response_mask[:, 1:].sum(dim=1)
        places = torch.arange(width, device=counts.device) < counts[:, None]
        written = collect(values.flatten(), bucket.places())
        rows.append(values.new_zeros(places.shape).masked_scatter(places, written))
    (found,) = batch.sides(torch.cat(rows))
    return found


def ask(
    model: Frozen,
    maker: BatchMaker,
    data: ItemSource,
    read: Callable[[Any, Batch], Tensor],
    width: int,
    *,
    rows: NDArray[np.int64] | None = None,
    **options: Any,
) -> Tensor:
    """``(N, width)`` float32 on the CPU, the same on every rank: what ``model`` says of N rows, without gradient.

    Args:
        model: asked with the length buckets of each batch.
        maker: plans the batches.
        data: the rows.
        read: turns the model's output for a batch into ``(B, w)`` with w up to ``width``.
        width: columns of the result.
        rows: which of ``data`` are asked about; ``None`` for all.
        options: of the model's forward.
    """
    rows = np.arange(len(data)) if rows is None else rows
    found = torch.zeros(len(rows), width, device=model.ranks.device)
    with asking(model):
        for start, batches in maker.chunks(data, rows):
            for batch in batches:
                values = read(model.forward(batch.buckets, **options), batch).float()
                padded = values.new_zeros(len(batch), width)
                padded[:, : values.shape[1]] = values
                places = model.ranks.gather_rows(batch.positions) + start
                found[places] = model.ranks.gather_rows(padded)
    return found.cpu()  # the one thing that the device is waited for
