"""This rank's micro-batches of a step or of an evaluation, and forwards over them without gradient."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from rlhf.data.batching import Batch, ItemSource, buckets_per_micro_step, collate, global_batch, plan_micro_batches
from rlhf.engine.frozen import Frozen
from rlhf.engine.ranks import Ranks
from rlhf.train.options import TrainConfig

EVALUATION_CHUNK = 512


class BatchMaker:
    """Plans, collates and counts; every rank makes the same plan, so nothing is sent.

    Attributes:
        items: size of the step's global batch.
        indices: which items of the data are in it.
        tokens: real tokens that this rank has been given since :meth:`step`.
        padded_tokens: the same with padding.
        packed_tokens: what is left of them where rows are packed: tokens with the same past count once.
    """

    def __init__(self, ranks: Ranks, config: TrainConfig, *, apart: bool = False) -> None:
        """``apart``: whether the batches of a step have their ``parts``."""
        self.ranks, self._config, self._apart = ranks, config, apart
        self.items = 0
        self.indices = np.zeros(0, np.int64)
        self.tokens = self.padded_tokens = self.packed_tokens = 0.0

    def step(self, data: ItemSource, step: int) -> list[Batch]:
        """The micro-batches of training ``step``."""
        config = self._config
        indices = global_batch(
            step, items=len(data), batch_size=config.global_batch_size, seed=config.seed, last=config.last_batch
        )
        self.items, self.indices = len(indices), indices
        self.tokens = self.padded_tokens = self.packed_tokens = 0.0
        return list(self._batches(data, indices, count=True))

    def chunks(self, data: ItemSource, indices: np.ndarray) -> Iterator[tuple[int, list[Batch]]]:
        """The rows ``indices`` of ``data`` a few hundred at a time, with where in ``indices`` each chunk begins."""
        for start in range(0, len(indices), EVALUATION_CHUNK):
            yield start, list(self._batches(data, indices[start : start + EVALUATION_CHUNK], count=False))

    def metrics(self) -> dict[str, float]:
        """Tokens and share of padding over all ranks since :meth:`step`; every rank must call it."""
        local = [self.tokens, self.padded_tokens, self.packed_tokens]
        tokens, padded, packed = self.ranks.sum(
            torch.tensor(local, dtype=torch.float64, device=self.ranks.device)
        ).tolist()
        if not packed:
            return {"tokens": tokens, "padding_share": 1.0 - tokens / padded}
        return {"tokens": tokens, "padding_share": 0.0, "shared_share": 1.0 - packed / tokens}

    def _batches(self, data: ItemSource, indices: np.ndarray, *, count: bool) -> Iterator[Batch]:
        """Fillers make the number of micro-batches and of their forwards equal on all ranks."""
        lengths = data.lengths[indices]
        plan = plan_micro_batches(
            lengths,
            token_budget=self._config.micro_batch_tokens,
            ranks=self.ranks.world_size,
            length_buckets=self._config.length_buckets,
        )
        for micro_step in plan:
            mine = micro_step[self.ranks.rank]
            if count:
                self.tokens += float(lengths[list(mine.items)].sum())
                self.padded_tokens += mine.padded_tokens
            batch = collate(
                data,
                indices,
                mine,
                buckets_per_micro_step(micro_step),
                packed=self._config.packing == "auto",
                apart=self._apart and count,
            )
            if count:
                asked = (part.buckets.packing for part in batch.parts or [batch])
                self.packed_tokens += sum(len(packing.tokens) for packing in asked if packing is not None)
            yield batch.to(self.ranks.device)


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
