"""This rank's micro-batches of a step or of an evaluation, and forwards over them without gradient."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf.data.batching import (
    Batch,
    ItemSource,
    MicroBatchPlan,
    buckets_per_micro_step,
    collate,
    global_batch,
    plan_micro_batches,
)
from rlhf.engine.frozen import Frozen
from rlhf.engine.ranks import Ranks
from rlhf.train.options import TrainConfig

EVALUATION_CHUNK = 512


@dataclass(frozen=True)
class _Step:
    """What is made of a step."""

    indices: np.ndarray
    batches: list[Batch]
    tokens: float
    padded_tokens: float
    packed_tokens: float


class BatchMaker:
    """Plans, collates and counts; every rank makes the same plan, so nothing is sent.

    While a step is computed, a thread makes the batches of the next one and starts their way to the device. They follow
    from the data and the number of the step alone, so nothing depends on whether they were made ahead.

    Attributes:
        items: size of the step's global batch.
        indices: which items of the data are in it.
        tokens: real tokens that this rank was given in the step.
        padded_tokens: the same with padding.
        packed_tokens: what is left of them where rows are packed: tokens with the same past count once.
    """

    def __init__(self, ranks: Ranks, config: TrainConfig, *, apart: bool = False) -> None:
        """``apart``: whether the batches of a step have their ``parts``."""
        self.ranks, self._config, self._apart = ranks, config, apart
        self.items = 0
        self.indices = np.zeros(0, np.int64)
        self.tokens = self.padded_tokens = self.packed_tokens = 0.0
        self._ahead: tuple[ItemSource, int, Future[_Step]] | None = None

    def step(self, data: ItemSource, step: int, *, ahead: bool = True) -> list[Batch]:
        """The micro-batches of training ``step``; ``ahead`` if those of the next number are likely to be next."""
        waiting, self._ahead = self._ahead, None
        if waiting is not None and waiting[0] is data and waiting[1] == step:
            made = waiting[2].result()
        else:
            made = self._make(data, step)
        if ahead:
            self._ahead = data, step + 1, _thread().submit(self._make, data, step + 1)
        self.items, self.indices = len(made.indices), made.indices
        self.tokens, self.padded_tokens, self.packed_tokens = made.tokens, made.padded_tokens, made.packed_tokens
        return made.batches

    def chunks(self, data: ItemSource, indices: np.ndarray) -> Iterator[tuple[int, list[Batch]]]:
        """The rows ``indices`` of ``data`` a few hundred at a time, with where in ``indices`` each chunk begins."""

        def make(start: int) -> list[Batch]:
            chosen = indices[start : start + EVALUATION_CHUNK]
            return [self._batch(data, chosen, micro_step) for micro_step in self._plan(data, chosen)]

        following: Future[list[Batch]] | None = None
        for start in range(0, len(indices), EVALUATION_CHUNK):
            made = make(start) if following is None else following.result()
            if start + EVALUATION_CHUNK < len(indices):
                following = _thread().submit(make, start + EVALUATION_CHUNK)
            yield start, made

    def metrics(self, *, packs: bool) -> dict[str, float]:
        """Tokens and share of padding over all ranks in the step, of a model that ``packs``. All ranks must call it."""
        local = [self.tokens, self.padded_tokens, self.packed_tokens]
        total = torch.tensor(local, dtype=torch.float64)
        if self.ranks.world_size > 1:
            total = self.ranks.sum(total.to(self.ranks.device))
        tokens, padded, packed = total.tolist()
        if not packed or not packs:
            return {"tokens": tokens, "padding_share": 1.0 - tokens / padded}
        return {"tokens": tokens, "padding_share": 0.0, "shared_share": 1.0 - packed / tokens}

    def _make(self, data: ItemSource, step: int) -> _Step:
        config = self._config
        indices = global_batch(
            step, items=len(data), batch_size=config.global_batch_size, seed=config.seed, last=config.last_batch
        )
        plan = self._plan(data, indices)
        batches = [self._batch(data, indices, micro_step, apart=self._apart) for micro_step in plan]
        mine = [micro_step[self.ranks.rank] for micro_step in plan]
        asked = (part.buckets.packing for batch in batches for part in batch.parts or [batch])
        return _Step(
            indices=indices,
            batches=batches,
            tokens=float(sum(data.lengths[indices[list(each.items)]].sum() for each in mine)),
            padded_tokens=float(sum(each.padded_tokens for each in mine)),
            packed_tokens=float(sum(len(packing.tokens) for packing in asked if packing is not None)),
        )

    def _plan(self, data: ItemSource, indices: np.ndarray) -> list[list[MicroBatchPlan]]:
        return plan_micro_batches(
            data.lengths[indices],
            token_budget=self._config.micro_batch_tokens,
            ranks=self.ranks.world_size,
            length_buckets=self._config.length_buckets,
        )

    def _batch(
        self, data: ItemSource, indices: np.ndarray, micro_step: list[MicroBatchPlan], *, apart: bool = False
    ) -> Batch:
        """This rank's batch. Fillers make the number of micro-batches and of their forwards equal on all ranks."""
        batch = collate(
            data,
            indices,
            micro_step[self.ranks.rank],
            buckets_per_micro_step(micro_step),
            packed=self._config.packing == "auto",
            apart=apart,
        )
        return batch.to(self.ranks.device)


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="batches")


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
