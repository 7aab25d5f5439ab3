"""Batch arithmetic against the batches that a run really makes."""

import numpy as np
import pytest
import torch

from launch.plan.batches import Lengths, assumed_lengths, batch_plan
from rlhf.data.options import DataConfig
from rlhf.data.preferences import load_preferences
from rlhf.engine.ranks import Ranks
from rlhf.train.batches import BatchMaker
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig


@pytest.fixture(scope="module")
def pairs(tiny_model, tiny_pairs, tmp_path_factory):
    config = DataConfig(train=str(tiny_pairs), eval_share=0.2, cache_dir=tmp_path_factory.mktemp("cache"))
    return load_preferences(config, load_chat(tiny_model)).train


def real_batches(data, train, ranks, steps):
    """Every rank's micro-batches of the first ``steps`` steps."""
    for step in range(steps):
        makers = [
            BatchMaker(
                Ranks(rank=rank, world_size=ranks, local_rank=rank, local_size=ranks, device=torch.device("cpu")), train
            )
            for rank in range(ranks)
        ]
        yield [maker.step(data, step) for maker in makers], makers


@pytest.mark.parametrize("ranks", [1, 3])
def test_micro_batches_and_tokens_are_those_of_the_run(pairs, ranks):
    train = TrainConfig(global_batch_size=20, micro_batch_tokens=400, epochs=1.5)
    found = batch_plan(Lengths(values=pairs.lengths, known_items=True, origin="counted"), train, ranks=ranks)
    steps = -(-len(pairs) // 20)
    counts, largest, real, padded = [], 0, 0.0, 0.0
    for batches, makers in real_batches(pairs, train, ranks, steps):
        counts.append(len(batches[0]))
        real += sum(maker.tokens for maker in makers)
        padded += sum(maker.padded_tokens for maker in makers)
        for batch in (each for mine in batches for each in mine if len(each)):
            largest = max(largest, sum(bucket.tokens.numel() for bucket in batch.buckets))
    assert found.steps_per_epoch == steps
    assert found.total_steps == int(np.ceil(1.5 * steps))
    assert found.micro_batches == pytest.approx(np.mean(counts))
    assert found.tokens_per_step == pytest.approx(real / steps)
    assert found.computed_per_step == pytest.approx(padded / steps, rel=0.02)  # fillers of one token are counted, too
    assert largest - 3 <= found.load.tokens <= largest  # a filler bucket may stand beside them


@pytest.mark.parametrize(("layout", "here"), [("rows", True), ("flex", True), ("rows", False)])
def test_packed_tokens_are_those_of_the_run(pairs, layout, here):
    """Where the rows are here, with what they begin alike with; else without, which is careful."""
    train = TrainConfig(global_batch_size=20, micro_batch_tokens=400, epochs=1.5)
    lengths = Lengths(values=pairs.lengths, known_items=True, origin="counted", rows=pairs if here else None)
    found = batch_plan(lengths, train, ranks=1, layout=layout)
    steps, packed, real, largest, padded = -(-len(pairs) // 20), 0.0, 0.0, 0, 0
    for (batches,), (maker,) in real_batches(pairs, train, 1, steps):
        packed += maker.packed_tokens
        real += maker.tokens
        for batch in batches:
            padded = max(padded, sum(bucket.tokens.numel() for bucket in batch.buckets))
            packing = batch.buckets.packing
            largest = max(largest, len((packing.padded() if layout == "flex" else packing).tokens))
    assert packed < 0.97 * real, "they share something"
    assert found.tokens_per_step == pytest.approx(real / steps)
    assert found.load.attended == (padded if layout == "rows" else None)
    if not here:
        assert found.computed_per_step == pytest.approx(real / steps)
    elif layout == "rows":
        assert found.computed_per_step == pytest.approx(packed / steps)
    if here:
        assert found.load.tokens == found.load.bucket_tokens == largest


def test_assumed_lengths_have_the_mean_and_the_limit():
    lengths = assumed_lengths(4000, 300, 2, longest=500)
    assert lengths.shape == (4000, 2)
    assert lengths.max() == 500
    assert lengths.mean() == pytest.approx(290, rel=0.05)  # what is cut off is missing
    assert (lengths == assumed_lengths(4000, 300, 2, longest=500)).all()


def test_without_a_count_of_rows_no_steps_are_invented():
    train = TrainConfig(global_batch_size=8, micro_batch_tokens=400)
    found = batch_plan(Lengths(values=np.full((64, 2), 100), known_items=False, origin=""), train, ranks=2)
    assert (found.items, found.steps_per_epoch, found.total_steps) == (None, None, None)
    assert found.micro_batches == 2
    assert found.load.tokens == 400
