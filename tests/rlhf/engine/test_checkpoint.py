import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.engine.checkpoint import COMPLETE, CheckpointStore
from rlhf.engine.ranks import Ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", ALONE, keep=2)


def write(text):
    def action(folder):
        (folder / "nested").mkdir()
        (folder / "nested" / "weights.bin").write_text(text)

    return action


def test_the_last_ones_and_the_protected_one_stay(store):
    for step in (5, 10, 15, 20):
        store.save(step, write(str(step)), protected=frozenset({5}))
    assert store.steps() == [5, 15, 20]


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / "nested" / "weights.bin").write_text("20 harmed"),
        lambda path: (path / "nested" / "weights.bin").unlink(),
        lambda path: (path / COMPLETE).unlink(),
        lambda path: (path / COMPLETE).write_text("{"),
    ],
    ids=["changed file", "missing file", "no listing", "half a listing"],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(store, harm, caplog):
    store.save(10, write("10"))
    store.save(20, write("20"))
    assert store.newest_intact() == store.path(20)
    harm(store.path(20))
    assert store.newest_intact() == store.path(10)
    assert "step-00000020 is damaged" in caplog.text


def test_a_write_that_fails_leaves_no_checkpoint(store):
    store.save(10, write("10"))

    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.save(20, fail)
    assert store.steps() == [10]
    assert store.newest_intact() == store.path(10)


def test_all_random_states_come_back(store):
    store.save(1, write("1"))
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.rand(7), random.random(), np.random.rand()
    store.restore_random_state(store.path(1))
    found = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def test_a_checkpoint_of_a_gpu_goes_on_without_one(store, monkeypatch):
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
        store.save(1, write("1"))
    expected = torch.rand(3)
    store.restore_random_state(store.path(1))
    assert torch.equal(torch.rand(3), expected)


def test_a_rank_that_was_not_there_draws_its_own_numbers_and_the_same_each_time(store):
    store.save(1, write("1"))
    first = replace(store, ranks=replace(ALONE, rank=1))
    drawn = []
    for each in (store, first, replace(store, ranks=replace(ALONE, rank=2)), first):
        each.restore_random_state(store.path(1))
        drawn.append((float(torch.rand(())), random.random(), np.random.rand()))
    assert drawn[1] == drawn[3]
    for numbers in zip(*drawn[:3], strict=True):
        assert len(set(numbers)) == 3


def test_an_empty_folder_has_no_checkpoint(store):
    assert store.steps() == [] and store.newest_intact() is None
