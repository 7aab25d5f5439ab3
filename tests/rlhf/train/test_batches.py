"""Batches that are made ahead are those that would be made when they are asked for."""

import threading

import numpy as np
import pytest
import torch

from rlhf.data.batching import Item, Row
from rlhf.engine.ranks import Ranks
from rlhf.train import batches as batches_module
from rlhf.train.batches import BatchMaker
from rlhf.train.options import TrainConfig

CONFIG = TrainConfig(global_batch_size=4, micro_batch_tokens=60)


class Source:
    """Pairs of rows; notes which thread asked for which of them."""

    fingerprint = "of the test"

    def __init__(self, seed=0, broken=None):
        draw = np.random.default_rng(seed)
        self.lengths, self.asked, self._broken = draw.integers(3, 12, (10, 2)), [], broken
        self._tokens = draw.integers(5, 50, (10, 2, 12))

    def __len__(self):
        return len(self.lengths)

    def item(self, index):
        self.asked.append((threading.current_thread(), index))
        if index == self._broken:
            raise OSError(5, "Input/output error")
        rows = [row[:length] for row, length in zip(self._tokens[index], self.lengths[index], strict=True)]
        return Item(f"rows.jsonl:{index}", tuple(Row(row, np.arange(len(row)) > 1) for row in rows))


def maker(rank=0):
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, local_size=2, device=torch.device("cpu"))
    return BatchMaker(ranks, CONFIG)


def contents(found: BatchMaker, batches):
    rows = [batch.row_ids for batch in batches]
    tokens = [batch.buckets.packing.tokens.tolist() for batch in batches]
    counted = found.items, found.indices.tolist(), found.tokens, found.padded_tokens, found.packed_tokens
    return rows, tokens, counted


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_made_ahead_are_those_of_a_run_that_begins_at_their_step(rank):
    going, data = maker(rank), Source()
    for step in range(6):
        fresh = maker(rank)
        assert contents(going, going.step(data, step)) == contents(fresh, fresh.step(data, step, ahead=False))


def test_those_of_the_next_step_are_made_by_another_thread_while_this_one_computes():
    going, data = maker(), Source()
    going.step(data, 0)
    going._ahead[2].result()
    data.asked.clear()
    going.step(data, 1, ahead=False)
    assert not data.asked, "they were there already"
    going.step(data, 2, ahead=False)
    assert {thread for thread, _ in data.asked} == {threading.main_thread()}, "nothing was made ahead of it"


def test_what_was_made_for_other_data_or_another_step_is_not_taken():
    going, first, second = maker(), Source(0), Source(1)
    going.step(first, 0)
    for data, step in ((second, 1), (second, 5), (first, 1), (first, 0)):
        fresh = maker()
        assert contents(going, going.step(data, step)) == contents(fresh, fresh.step(data, step, ahead=False))


def test_a_row_that_cannot_be_read_is_an_error_of_its_own_step():
    found = maker()
    mine = [batch.row_ids for batch in found.step(Source(), 1, ahead=False)]
    broken = int(mine[0][0].rpartition(":")[2])
    going, data = maker(), Source(broken=broken)
    going.step(data, 0)
    with pytest.raises(OSError, match="Input/output error"):
        going.step(data, 1)


def test_chunks_of_an_evaluation_are_those_of_their_rows(monkeypatch):
    monkeypatch.setattr(batches_module, "EVALUATION_CHUNK", 3)
    data, rows = Source(), np.array([7, 1, 4, 9, 0, 2, 8])
    found = list(maker().chunks(data, rows))
    assert [start for start, _ in found] == [0, 3, 6]
    for start, made in found:
        ((_, alone),) = maker().chunks(data, rows[start : start + 3])
        assert [batch.row_ids for batch in made] == [batch.row_ids for batch in alone]
        assert {int(index) for batch in made for index in batch.indices} <= {*rows[start : start + 3].tolist()}
