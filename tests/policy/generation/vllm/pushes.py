"""What holds of weights on their way to a real vLLM, by a folder or as a stream."""

import json
import logging
import os
import signal
import threading
from pathlib import Path

import numpy as np

from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.generation.vllm.engine.margin_engine import TOKEN_VARIABLE
from policy.generation.vllm.sampler import VllmSampler
from tests.policy.generation.vllm.conftest import assert_same, move

WORKER = str(Path(__file__).parents[1] / "workers" / "push.py")
GREEDY = SamplingConfig(max_new_tokens=12, top_k=1, batch_rows=32)
LONG = SamplingConfig(max_new_tokens=100, top_k=1, batch_rows=8)


def both_samplers(model, pool, config, **options):
    """That of the engines and the own one, of one policy."""
    shared = {"eos_token_ids": (2,), "tokenizer": None}
    own = HfSampler(model, config, pad_token_id=2, **shared)
    return VllmSampler(model.ranks, pool, config, **shared, **options), own


def assert_pushes_change_completions(policy, push, ours, own, prompts, seeds):
    """Check that completions are those of the policy, before and after it moves; the last ones, and their version."""
    assert push.push()
    before = ours.generate(prompts, seeds)
    assert_same(before, own.generate(prompts, seeds))
    move(policy)
    assert push.push()
    after = ours.generate(prompts, seeds)
    assert_same(after, own.generate(prompts, seeds))
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(before, after, strict=True))
    version = push.version
    assert not push.push() and push.pushes == 2  # nothing is new
    return after, version


def assert_a_killed_engine_comes_back(policy, push, ours, own, pool, caplog):
    """Kill the engine in a rollout of 64 responses; the counts that were told on the way are returned."""
    push.push()
    move(policy)
    push.push()
    prompts = [np.arange(3, 9) + place for place in range(64)]
    seen, counts = threading.Event(), []

    def advance(count: int) -> None:
        counts.append(count)
        if count > 4:
            seen.set()

    def kill() -> None:
        seen.wait(60)
        os.kill(pool.pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    before, version = pool.restarts, push.version
    with caplog.at_level(logging.WARNING):
        found = ours.generate(prompts, range(64), advance)
    killer.join()
    assert pool.restarts == before + 1 and push.version == version
    assert "started again with the weights of now" in caplog.text
    assert_same(found, own.generate(prompts, range(64)))
    return counts


def assert_ranks_push(run_ranks, pool, monkeypatch, folder, model, transport, *, kind, ranks, lora):
    """Check the completions before and after two pushes of ranks that share the weights out."""
    url, _ = pool._client(0).url, monkeypatch.setenv(TOKEN_VARIABLE, pool._token)
    output = folder / "drawn.json"
    run_ranks([WORKER, str(model), kind, str(lora), url, transport, str(output)], ranks=ranks)
    found = json.loads(output.read_text())
    (before, own_before), (after, own_after) = found["rounds"]
    assert before == own_before and after == own_after
    assert before != after and found["pushes"] == 2
