"""This rank's micro-batches of a step or of an evaluation, and forwards over them without gradient."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from rlhf.core.packing import packed_length
from rlhf.data.batching import (
    Batch,
    ItemSource,
    buckets_per_micro_step,
    collate,
    global_batch,
    plan_micro_batches,
    plan_packed,
)
from rlhf.engine.frozen import Frozen
from rlhf.engine.ranks import Ranks
from rlhf.train.options import TrainConfig

EVALUATION_CHUNK = 512
LEAST_SAVING = 0.05
"""Share of the tokens that packing must save: attention over packed rows is slower."""


class BatchMaker:
    """Plans, collates and counts; every rank makes the same plan, so nothing is sent.

    Attributes:
        items: size of the step's global batch.
        indices: which items of the data are in it.
        tokens: real tokens that this rank has been given since :meth:`step`.
        padded_tokens: the same with padding.
    """

    def __init__(self, ranks: Ranks, config: TrainConfig, longest_packed: int = 0) -> None:
        """``longest_packed``: tokens of the longest packed row that the model computes exactly, 0 for none; see
        :func:`rlhf.models.prefix_sharing.longest_packed_row`. Ranks must agree on it."""
        self.ranks, self._config = ranks, config
        asked = config.share_prompts == "always" or (config.share_prompts == "auto" and ranks.device.type == "cpu")
        self._longest_packed = longest_packed if asked else 0
        self.items = 0
        self.indices = np.zeros(0, np.int64)
        self.tokens = self.padded_tokens = 0.0

    def step(self, data: ItemSource, step: int) -> list[Batch]:
        """The micro-batches of training ``step``."""
        config = self._config
        indices = global_batch(
            step, items=len(data), batch_size=config.global_batch_size, seed=config.seed, last=config.last_batch
        )
        self.items, self.indices, self.tokens, self.padded_tokens = len(indices), indices, 0.0, 0.0
        return list(self._batches(data, indices, count=True))

    def chunks(self, data: ItemSource, indices: np.ndarray) -> Iterator[tuple[int, list[Batch]]]:
        """The rows ``indices`` of ``data`` a few hundred at a time, with where in ``indices`` each chunk begins."""
        for start in range(0, len(indices), EVALUATION_CHUNK):
            yield start, list(self._batches(data, indices[start : start + EVALUATION_CHUNK], count=False))

    def metrics(self) -> dict[str, float]:
        """Tokens and share of padding over all ranks since :meth:`step`; every rank must call it."""
        local = torch.tensor([self.tokens, self.padded_tokens], dtype=torch.float64, device=self.ranks.device)
        tokens, padded = self.ranks.sum(local).tolist()
        return {"tokens": tokens, "padding_share": 1.0 - tokens / padded}

    def _batches(self, data: ItemSource, indices: np.ndarray, *, count: bool) -> Iterator[Batch]:
        """Fillers make the number of micro-batches and of their forwards equal on all ranks."""
        lengths = data.lengths[indices]
        packed = self._packed_lengths(data, indices)
        options = {
            "token_budget": self._config.micro_batch_tokens,
            "ranks": self.ranks.world_size,
            "length_buckets": self._config.length_buckets,
        }
        if packed is None:
            plan = plan_micro_batches(lengths, **options)
        else:
            plan, lengths = plan_packed(packed, lengths.shape[1], **options), packed
        for micro_step in plan:
            mine = micro_step[self.ranks.rank]
            if count:
                self.tokens += float(lengths[list(mine.items)].sum())
                self.padded_tokens += mine.padded_tokens
            yield collate(data, indices, mine, buckets_per_micro_step(micro_step)).to(self.ranks.device)

    def _packed_lengths(self, data: ItemSource, indices: np.ndarray) -> np.ndarray | None:
        """``(P,)`` tokens of the packed rows of the items; ``None`` where packing them saves little or is not exact."""
        lengths = data.lengths[indices]
        if not self._longest_packed or lengths.shape[1] < 2:
            return None
        packed = np.array([packed_length([row.tokens for row in data.item(int(index)).rows]) for index in indices])
        saves = packed.sum() <= (1 - LEAST_SAVING) * lengths.sum()
        return packed if saves and packed.max() <= self._longest_packed else None


def without_gradient(model: Frozen, batches: Iterable[Batch], **options: Any) -> Iterator[tuple[Batch, Any]]:
    """Each batch with what the model says about its length buckets, dropout off. All ranks must call it alike."""
    with asking(model):
        for batch in batches:
            yield batch, model.forward(batch.buckets, **options)


@contextlib.contextmanager
def asking(model: Frozen) -> Iterator[None]:
    """Switch gradient and dropout off inside the block."""
    module = model.module
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
