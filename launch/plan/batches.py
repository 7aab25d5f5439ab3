"""Batch arithmetic: the micro-batches that the run's own planner makes of real lengths, or of assumed ones."""

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from launch.plan.activations import Load
from rlhf.core.epochs import steps_per_epoch
from rlhf.core.packing import packed_tokens, padded_length
from rlhf.data.batching import ItemSource, MicroBatchPlan, global_batch, plan_micro_batches
from rlhf.train.options import TrainConfig

SAMPLED_STEPS = 12
"""Steps whose micro-batches are planned, evenly over the first epoch."""
GAMMA_SHAPE = 4.0
"""Shape of the gamma distribution of assumed lengths: coefficient of variation 1/2, as in usual preference data."""


Layout = Literal["buckets", "flex", "rows"]
"""How a micro-batch is laid out: in length buckets, or packed, with the kernel of rlhf.models.packed_attention."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """``(N, S)`` tokens of the rows of each item; of PPO, of the prompts."""

    values: np.ndarray
    known_items: bool
    """Whether they are as many as the data has; else only the sizes of a step follow from them."""
    origin: str
    """Where they come from, in words."""
    rows: ItemSource | None = None
    """The rows themselves, where they are here: what they begin alike with is packed once."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What a step of one optimizer is made of."""

    items: int | None
    """Items of the training data; ``None`` if nobody knows."""
    global_batch: int
    steps_per_epoch: int | None
    total_steps: int | None
    micro_batches: float
    """Micro-batches of a step on each rank, on average."""
    most_micro_batches: int
    tokens_per_step: float
    """Real tokens of a step, over all ranks."""
    computed_per_step: float
    """Those that are computed: with padding, or packed."""
    squares_per_step: float
    """Sum over rows of their padded length squared, over all ranks."""
    load: Load
    """The largest micro-batch of a rank."""


def assumed_lengths(rows: int, mean_tokens: float, rows_per_item: int, longest: int) -> np.ndarray:
    """``(rows, S)`` lengths, gamma-distributed around ``mean_tokens`` and cut at ``longest``; the same every time."""
    drawn = np.random.default_rng(0).gamma(GAMMA_SHAPE, mean_tokens / GAMMA_SHAPE, (rows, rows_per_item))
    return np.clip(np.round(drawn), 2, longest).astype(np.int64)


def batch_plan(lengths: Lengths, train: TrainConfig, *, ranks: int, layout: Layout = "buckets") -> BatchPlan:
    """Plan steps as :class:`rlhf.train.batches.BatchMaker` does, for a recipe's section ``train``."""
    from rlhf.train.stage import total_steps

    values, count = lengths.values, len(lengths.values)
    size, last = train.global_batch_size, train.last_batch
    steps = steps_per_epoch(count, size, last)
    total = total_steps(train, count) if lengths.known_items else train.max_steps
    planned = min(steps, total or steps)
    sampled = np.unique(np.linspace(0, planned - 1, min(planned, SAMPLED_STEPS)).astype(int))
    counts, loads, real = [], [], 0.0
    for step in sampled.tolist():
        chosen = global_batch(step, items=count, batch_size=size, seed=train.seed, last=last)
        batch = values[chosen]
        micro_steps = plan_micro_batches(
            batch, token_budget=train.micro_batch_tokens, ranks=ranks, length_buckets=train.length_buckets
        )
        real += float(batch.sum())
        counts.append(len(micro_steps))
        for plan in (each for micro_step in micro_steps for each in micro_step):
            load = load_of(batch, plan)
            loads.append(load if layout == "buckets" else _packed(load, lengths.rows, batch, chosen, plan, layout))
    return BatchPlan(
        items=count if lengths.known_items else None,
        global_batch=train.global_batch_size,
        steps_per_epoch=steps if lengths.known_items else None,
        total_steps=total,
        micro_batches=float(np.mean(counts)),
        most_micro_batches=max(counts),
        tokens_per_step=real / len(sampled),
        computed_per_step=sum(load.tokens for load in loads) / len(sampled),
        squares_per_step=sum(load.squares for load in loads) / len(sampled),
        load=_largest(loads),
    )


def load_of(lengths: np.ndarray, plan: MicroBatchPlan) -> Load:
    """What a micro-batch in length buckets has the device compute."""
    if not plan.items:
        return Load(tokens=1, bucket_tokens=1, squares=1, bucket_squares=1)
    rows = lengths[list(plan.items)].T.reshape(-1)
    buckets = [(len(bucket), int(rows[list(bucket)].max())) for bucket in plan.buckets]
    return Load(
        tokens=sum(count * width for count, width in buckets),
        bucket_tokens=max(count * width for count, width in buckets),
        squares=sum(count * width**2 for count, width in buckets),
        bucket_squares=max(count * width**2 for count, width in buckets),
    )


def _packed(
    load: Load, rows: ItemSource | None, lengths: np.ndarray, chosen: np.ndarray, plan: MicroBatchPlan, layout: Layout
) -> Load:
    """The same of its packed sequence, of the items ``chosen`` for a step. Rows that are not here share nothing."""
    tokens = int(lengths[list(plan.items)].sum()) if plan.items else 1
    if rows is not None and plan.items:
        tokens = packed_tokens([row.tokens for place in plan.items for row in rows.item(int(chosen[place])).rows])
    if layout == "flex":
        tokens = padded_length(tokens)
    return replace(
        load, tokens=tokens, bucket_tokens=tokens, attended=load.tokens if layout == "rows" else None
    )


def _largest(loads: list[Load]) -> Load:
    """The most of everything: a step that is short of memory once has failed."""
    most = {each.name: max(getattr(load, each.name) or 0 for load in loads) for each in fields(Load)}
    return Load(**most | {"attended": most["attended"] or None})
