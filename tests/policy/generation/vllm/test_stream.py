"""Weights that the real vLLM is sent as a stream: they arrive or are refused, and engines are lost on the way."""

import logging
import os
import signal

import pytest
import torch

from policy.generation.vllm.client import Weights
from policy.generation.vllm.link import Link
from policy.generation.vllm.weights import WeightPush
from rlhf.core.errors import ModelError
from rlhf.engine.frozen import ReplicatedModel
from rlhf.models.options import LoraOptions
from tests.policy.generation.vllm.conftest import assert_same, move
from tests.policy.generation.vllm.pushes import (
    GREEDY,
    LONG,
    assert_a_killed_engine_comes_back,
    assert_pushes_change_completions,
    assert_ranks_push,
    both_samplers,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def streaming(streamed_pool, alone):
    """``streaming(policy)``: a push to the shared engine, and both samplers of the policy."""

    def make(policy, config=GREEDY):
        model = ReplicatedModel(policy, alone)
        push = WeightPush(model, streamed_pool, None)
        if streamed_pool._weights is not None:
            streamed_pool._of_before = int(streamed_pool._client(0).state()["newest"])
            streamed_pool._links = [None]  # another trainer may have had the engine
        return push, *both_samplers(model, streamed_pool, config, renew=push.renew)

    return make


def test_sent_weights_give_the_completions_of_the_policy_that_was_sent(streaming, wide_policy, prompts, seeds):
    policy = wide_policy()
    push, ours, own = streaming(policy)
    after, version = assert_pushes_change_completions(policy, push, ours, own, prompts, seeds)
    assert push.version == version + 1
    assert_same(ours.generate(prompts, seeds), after)


def test_adapters_arrive_merged_and_the_head_where_it_is_the_embedding(streaming, wide_policy, prompts, seeds):
    policy = wide_policy(lora=LoraOptions(rank=4, alpha=8))
    move(policy, 0.1)
    push, ours, own = streaming(policy)
    push.push()
    with torch.no_grad():
        policy.hf.get_input_embeddings().weight.mul_(1.7)
    push.push()
    assert_same(ours.generate(prompts, seeds), own.generate(prompts, seeds))


@pytest.mark.parametrize(
    "left_out", ["layers.1.self_attn.v_proj", "layers.2.mlp.up_proj", "embed_tokens", "model.norm"]
)
def test_a_tensor_that_is_not_sent_is_found(streaming, wide_policy, monkeypatch, left_out):
    policy = wide_policy()
    push, _, _ = streaming(policy)
    push.push()
    move(policy)
    send = Link.send
    monkeypatch.setattr(Link, "send", lambda self, name, tensor: [] if left_out in name else send(self, name, tensor))
    with pytest.raises(ModelError, match="are not what was sent"):
        push.push()


def test_a_stream_that_never_came_is_found(streaming, streamed_pool, wide_policy, monkeypatch):
    policy = wide_policy()
    push, _, _ = streaming(policy)
    push.push()
    move(policy)
    for name in ("listen", "finish"):
        monkeypatch.setattr(Link, name, lambda *_: None)
    with pytest.raises(ModelError, match="are not what was sent"):
        push.push()


def test_streams_out_of_order_are_refused_and_the_newer_weights_stay(
    streaming, streamed_pool, wide_policy, prompts, seeds
):
    policy = wide_policy()
    push, ours, own = streaming(policy)
    push.push()
    move(policy)
    push.push()
    newer = streamed_pool._weights
    with pytest.raises(ModelError, match=f"weights of version {newer.version - 1} came after those of version"):
        streamed_pool.listen(newer.version - 1)
    with pytest.raises(ModelError, match=f"weights of version {newer.version - 1} came after those of version"):
        streamed_pool._versions = [0]
        streamed_pool.set_weights(Weights(None, newer.version - 1, newer.sums))
    streamed_pool._weights, streamed_pool._versions = newer, [newer.version]
    assert_same(ours.generate(prompts, seeds), own.generate(prompts, seeds))


def test_an_engine_that_is_killed_in_a_rollout_is_sent_the_weights_of_now(
    streaming, streamed_pool, wide_policy, caplog
):
    policy = wide_policy()
    push, ours, own = streaming(policy, LONG)
    counts = assert_a_killed_engine_comes_back(policy, push, ours, own, streamed_pool, caplog)
    assert counts == list(range(1, 65))


def test_an_engine_that_is_killed_in_the_middle_of_the_weights_is_sent_them_again(
    streaming, streamed_pool, wide_policy, prompts, seeds, monkeypatch, caplog
):
    policy = wide_policy()
    push, ours, own = streaming(policy)
    push.push()
    move(policy)
    send, sent, pid = Link.send, [], streamed_pool.pids[0]

    def deadly(self, name, tensor):
        sent.append(name)
        if len(sent) == 7:
            os.kill(pid, signal.SIGKILL)
        return send(self, name, tensor)

    monkeypatch.setattr(Link, "send", deadly)
    before = streamed_pool.restarts
    with caplog.at_level(logging.WARNING):
        assert push.push()
    assert streamed_pool.restarts == before + 1 and "vLLM engine 0 is lost" in caplog.text
    assert streamed_pool.pids[0] != pid
    assert_same(ours.generate(prompts, seeds), own.generate(prompts, seeds))


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "ranks", "lora"), [("zero2", 2, 0), ("zero3", 2, 0), ("zero3", 2, 4)])
def test_weights_are_sent_by_ranks_that_share_them(
    run_ranks, wide_model, streamed_pool, wide_policy, streaming, tmp_path, monkeypatch, kind, ranks, lora
):
    streaming(wide_policy())[0].push()  # which starts the engine
    assert_ranks_push(
        run_ranks, streamed_pool, monkeypatch, tmp_path, wide_model, "gloo", kind=kind, ranks=ranks, lora=lora
    )
