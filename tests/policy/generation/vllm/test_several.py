"""The real vLLM in several processes: engines side by side, and an engine of several workers."""

import logging
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.generation.vllm.client import EngineClient
from policy.generation.vllm.pool import EnginePool
from policy.generation.vllm.sampler import VllmSampler, launch_of
from policy.generation.vllm.weights import WeightPush
from rlhf.engine.frozen import ReplicatedModel
from tests.policy.generation.vllm.conftest import assert_same, move

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TRANSPORTS = pytest.mark.parametrize("transport", ["folder", "gloo"])


@pytest.fixture
def several(wide_policy, wide_model, engine_options, alone, tmp_path):
    """``several(tokens, **engine options)``: a policy, the pool, the push, and samplers by vLLM and by the policy."""
    pools = []

    def start(tokens, **options):
        config = SamplingConfig(max_new_tokens=tokens, top_k=1, batch_rows=8, vllm=replace(engine_options, **options))
        policy = wide_policy()
        model = ReplicatedModel(policy, alone)
        pool = EnginePool(launch_of(config, dtype=torch.float32, folder=tmp_path, tokenizer=wide_model))
        pools.append(pool)
        push = WeightPush(model, pool, tmp_path / "weights" if config.vllm.transport == "folder" else None)
        ends = {"eos_token_ids": (2,), "tokenizer": None}
        ours = VllmSampler(alone, pool, config, renew=push.renew, **ends)
        return policy, pool, push, ours, HfSampler(model, config, pad_token_id=2, **ends)

    yield start
    for pool in pools:
        pool.close()


@TRANSPORTS
def test_of_two_engines_each_writes_its_share_and_the_one_that_is_killed_comes_back(
    several, caplog, monkeypatch, transport
):
    policy, pool, push, ours, own = several(100, engines=2, transport=transport)
    push.push()
    move(policy)
    push.push()
    assert [client.state()["version"] for client in pool._clients] == [2, 2]
    asked: dict[str, list[int]] = {}
    generate = EngineClient.generate

    def noted(client, version, settings, rows):
        asked.setdefault(client.url, []).append(sum(len(tokens) for tokens, _ in rows))
        return generate(client, version, settings, rows)

    monkeypatch.setattr(EngineClient, "generate", noted)
    prompts = [np.arange(3, 6 + place % 23) for place in range(64)]
    urls, before, seen = [client.url for client in pool._clients], pool.pids, threading.Event()

    def kill() -> None:
        seen.wait(60)
        os.kill(before[1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with caplog.at_level(logging.WARNING):
        found = ours.generate(prompts, range(64), lambda count: seen.set() if count > 4 else None)
    killer.join()
    shares = [asked[url][0] for url in urls]
    assert sum(shares) == sum(map(len, prompts)) and abs(shares[0] - shares[1]) <= max(map(len, prompts))
    assert pool.restarts == 1 and "vLLM engine 1 is lost" in caplog.text
    assert pool.pids[0] == before[0] and pool.pids[1] != before[1]
    assert_same(found, own.generate(prompts, range(64)))


@TRANSPORTS
def test_two_workers_share_the_weights_of_an_engine_and_its_checksums_are_of_all(
    several, prompts, seeds, monkeypatch, transport
):
    """There is one head of keys and values, so that both workers have the same ones."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # then vLLM would bind threads, each worker's on its own node
    policy, _, push, ours, own = several(12, tensor_parallel=2, transport=transport)
    push.push()
    before = ours.generate(prompts, seeds)
    assert_same(before, own.generate(prompts, seeds))
    move(policy)
    push.push()
    after = ours.generate(prompts, seeds)
    assert_same(after, own.generate(prompts, seeds))
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(before, after, strict=True))
