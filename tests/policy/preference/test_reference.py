import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy.preference.reference import CacheJob, LiveReference, cache_folder, open_cache
from rlhf.core.errors import CheckpointError, ConfigError, RunStopped
from rlhf.engine.frozen import ReplicatedModel, move_towards
from rlhf.engine.stop import STOP_FILE, StopRequests
from rlhf.models.options import LoraOptions
from rlhf.train.batches import BatchMaker
from rlhf.train.options import TrainConfig

KEY = {"data": "d", "reference weights": "w"}


class Counted:
    """A frozen model that counts its forwards, and can break down after some of them."""

    def __init__(self, module, ranks, limit=10**9):
        self.inner, self.ranks, self.module = ReplicatedModel(module, ranks), ranks, module
        self.forwards, self.limit = 0, limit

    def forward(self, *args, **kwargs):
        self.forwards += 1
        if self.forwards > self.limit:
            raise KeyboardInterrupt
        return self.inner.forward(*args, **kwargs)


@pytest.fixture
def job(tiny_data, alone):
    def make(data=tiny_data.train, key=KEY, shard_items=10, verify_items=4, budget=400):
        batches = BatchMaker(alone, TrainConfig(micro_batch_tokens=budget))
        return CacheJob(
            data=data, batches=batches, key=key, shard_items=shard_items, verify_items=verify_items, precision="float32"
        )

    return make


def ask_nobody():
    raise AssertionError("the reference was asked for")


def test_a_cache_says_what_the_live_model_says(job, tiny_policy, tiny_data, alone, tmp_path):
    model = ReplicatedModel(tiny_policy(), alone)
    cached = open_cache(tmp_path / "cache", job(), lambda: model)
    for batch in BatchMaker(alone, TrainConfig(micro_batch_tokens=300)).step(tiny_data.train, 0):
        live, found = LiveReference(model).of(batch), cached.of(batch)
        torch.testing.assert_close(found.head, live.head, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.tail, live.tail, rtol=1e-4, atol=1e-4)


def test_a_finished_cache_asks_only_for_its_sample(job, tiny_policy, alone, tmp_path):
    model = Counted(tiny_policy(), alone)
    first = open_cache(tmp_path / "cache", job(), lambda: model).values
    spent, model.forwards = model.forwards, 0
    second = open_cache(tmp_path / "cache", job(), lambda: model).values
    assert 0 < model.forwards < spent / 4
    assert np.array_equal(first, second)
    open_cache(tmp_path / "cache", job(verify_items=0), ask_nobody)


def test_an_interrupted_cache_goes_on_with_the_shards_that_are_missing(job, tiny_policy, alone, tmp_path):
    whole = Counted(tiny_policy(), alone)
    expected = open_cache(tmp_path / "whole", job(), lambda: whole).values
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path / "cache", job(), lambda: Counted(tiny_policy(), alone, limit=whole.forwards // 2))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*.npy")}
    assert 2 <= len(kept) <= 6
    again = Counted(tiny_policy(), alone)
    found = open_cache(tmp_path / "cache", job(verify_items=0), lambda: again).values
    assert again.forwards < 0.8 * whole.forwards
    assert np.array_equal(found, expected)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_asked_to_stop_the_cache_keeps_the_shards_that_it_has(job, tiny_policy, alone, tmp_path):
    class Impatient(Counted):
        def forward(self, *args, **kwargs):
            (tmp_path / STOP_FILE).touch()
            return super().forward(*args, **kwargs)

    asked = replace(job(), stop=StopRequests(tmp_path, alone, None))
    with pytest.raises(RunStopped, match=r"stopped after 10 of [0-9]+ reference log-probabilities by the file"):
        open_cache(tmp_path / "cache", asked, lambda: Impatient(tiny_policy(), alone))
    assert len(list((tmp_path / "cache").glob("shard-*.npy"))) == 1
    open_cache(tmp_path / "cache", asked, lambda: Counted(tiny_policy(), alone))


def test_a_damaged_shard_is_made_again(job, tiny_policy, alone, tmp_path):
    model = ReplicatedModel(tiny_policy(), alone)
    expected = open_cache(tmp_path / "cache", job(), lambda: model).values
    shard = tmp_path / "cache" / "shard-000003.npy"
    shard.write_bytes(shard.read_bytes()[:-20])
    assert np.array_equal(open_cache(tmp_path / "cache", job(), lambda: model).values, expected)


def test_numbers_of_another_model_are_found_out(job, tiny_policy, alone, tmp_path):
    open_cache(tmp_path / "cache", job(), lambda: ReplicatedModel(tiny_policy(), alone))
    moved = ReplicatedModel(tiny_policy(noise=0.02), alone)
    with pytest.raises(CheckpointError, match=r"nats per token .* when computed again; another model"):
        open_cache(tmp_path / "cache", job(), lambda: moved)


def test_a_cache_of_other_data_is_refused_by_name(job, tiny_policy, tiny_data, alone, tmp_path):
    model = ReplicatedModel(tiny_policy(), alone)
    open_cache(tmp_path / "cache", job(), lambda: model)
    with pytest.raises(ConfigError, match=r"data: d in the cache, other now\n.*leave reference.cache out"):
        open_cache(tmp_path / "cache", job(key=KEY | {"data": "other"}), ask_nobody)
    with pytest.raises(ConfigError, match=f"{len(tiny_data.train)} items, not {len(tiny_data.evals)}"):
        open_cache(tmp_path / "cache", job(data=tiny_data.evals), ask_nobody)


def test_a_folder_that_is_no_cache_is_refused(job, tmp_path):
    (tmp_path / "header.json").write_text(json.dumps({"shard_items": 3}))
    with pytest.raises(ConfigError, match="is not the header of a reference cache"):
        open_cache(tmp_path, job(), ask_nobody)


def test_every_part_of_the_key_makes_its_own_place(tmp_path):
    places = {cache_folder(tmp_path, KEY), *(cache_folder(tmp_path, KEY | {name: "x"}) for name in KEY)}
    assert len(places) == 3


def test_a_reference_that_is_not_finite_names_its_rows(job, tiny_policy, alone, tmp_path):
    broken = tiny_policy()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"not finite for 10 items, such as .*pairs\.jsonl:\d+"):
        open_cache(tmp_path / "cache", job(), lambda: ReplicatedModel(broken, alone))


def test_with_adapters_off_the_trained_model_is_its_base(tiny_policy, tiny_data, alone):
    lora = ReplicatedModel(tiny_policy(lora=LoraOptions(rank=2, alpha=4.0)), alone)
    with torch.no_grad():
        for name, parameter in lora.module.named_parameters():
            if "lora_" in name:
                parameter += 0.3
    batch = BatchMaker(alone, TrainConfig()).step(tiny_data.train, 0)[0]
    base = LiveReference(ReplicatedModel(tiny_policy(), alone)).of(batch)
    torch.testing.assert_close(LiveReference(lora, adapters_off=True).of(batch).head, base.head)
    assert not torch.allclose(LiveReference(lora).of(batch).head, base.head, rtol=1e-2)


def test_a_reference_moves_towards_the_policy_and_back(tiny_policy, alone, tmp_path):
    target, source = ReplicatedModel(tiny_policy(), alone), ReplicatedModel(tiny_policy(noise=0.1), alone)
    before = [value.clone() for value in target.module.parameters()]
    LiveReference(target, moves=True).save(tmp_path)
    move_towards(target, source, 0.25)
    for found, start, end in zip(target.module.parameters(), before, source.module.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), 0.75 * start + 0.25 * end)
    LiveReference(target, moves=True).load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(target.module.parameters(), before, strict=True))
