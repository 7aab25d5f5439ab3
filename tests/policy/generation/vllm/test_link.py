"""Weights that are sent as a stream, without vLLM: what arrives, and engines that are lost on the way."""

import logging
import threading
import time

import pytest
import torch

from policy.generation.options import SamplingConfig, VllmConfig
from policy.generation.vllm.client import EngineClient, EngineLost
from policy.generation.vllm.engine.margin_stream import Receiver, Sender
from policy.generation.vllm.link import Link
from policy.generation.vllm.process import check_vllm
from policy.generation.vllm.training import VllmTrainingSampler
from rlhf.core.errors import ConfigError, ModelError, TrainingStopped
from rlhf.data.templates import chat_format
from rlhf.engine.frozen import ReplicatedModel
from rlhf.models.tokenizer import load_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


@pytest.fixture
def streaming(fake, alone, tiny_policy, tiny_model, tmp_path):
    """``streaming(**engine options)``: a sampler that sends weights to the fake engine, and their policy."""
    samplers = []

    def make(**options):
        policy, chat = tiny_policy(), chat_format(load_tokenizer(tiny_model), TEMPLATE)
        vllm = VllmConfig(
            urls=(fake[1],), transport="gloo", **{"timeout_seconds": 5.0, "start_seconds": 3.0, **options}
        )
        config = SamplingConfig(max_new_tokens=4, backend="vllm", vllm=vllm)
        samplers.append(VllmTrainingSampler(ReplicatedModel(policy, alone), chat, config, tmp_path))
        return samplers[-1], policy

    yield make
    for sampler in samplers:
        sampler.close()


def assert_has_them(engine, policy) -> None:
    expected = dict(policy.hf.named_parameters())
    assert engine.received.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(engine.received[name], weight.detach(), rtol=0, atol=0)


def change(policy) -> None:
    with torch.no_grad():
        policy.hf.model.norm.weight += 0.5


def test_tensors_of_all_types_and_shapes_arrive_bit_by_bit_at_all_workers():
    sent = {
        "float32": torch.randn(3, 5),
        "bfloat16": torch.randn(7).bfloat16(),
        "float16": torch.randn(2, 1, 3).half(),
        "a column, not contiguous": torch.randn(4, 6).t()[:, 1:3],
        "one number": torch.tensor(3, dtype=torch.int64),
        "none": torch.empty(0, 4),
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    sender = Sender("gloo", "127.0.0.1", 2, 5.0)
    found: dict[int, list] = {}

    def receive(rank: int) -> None:
        receiver = Receiver(sender.meeting, rank)
        found[rank] = [list(receiver), list(receiver)]

    workers = [threading.Thread(target=receive, args=(rank,)) for rank in (1, 2)]
    for worker in workers:
        worker.start()
    while not sender.all_are_here:
        time.sleep(0.01)
    sender.open()
    for names in (list(sent), ["one number"]):  # two passes over one group
        for name in names:
            for work in sender.send(name, sent[name]):
                work.wait()
        sender.end()
    for worker in workers:
        worker.join()
    for first, second in found.values():
        assert [name for name, _ in first] == list(sent) and [name for name, _ in second] == ["one number"]
        for name, tensor in first:
            assert tensor.dtype == sent[name].dtype
            torch.testing.assert_close(tensor, sent[name], rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_a_frame_is_refused():
    sender = Sender("gloo", "127.0.0.1", 1, 5.0)
    with pytest.raises(ValueError, match="takes more than 1024 bytes"):
        sender.send("layer." * 200, torch.zeros(1))


def test_every_call_sends_the_weights_of_now_and_versions_go_up(fake, streaming, prompts, seeds, tmp_path):
    sampler, policy = streaming()
    sampler.generate(prompts, seeds)
    assert_has_them(fake[0], policy)
    change(policy)
    sampler.generate(prompts, seeds)
    assert_has_them(fake[0], policy)
    sampler.generate(prompts, seeds)
    assert [asked["version"] for asked in fake[0].asked] == [1, 2, 3]
    assert sampler.metrics() == {"rollout/version": 3.0, "rollout/pushes": 2.0, "rollout/engine_restarts": 0.0}
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("fault", ["gives_up_after", "hangs_after"])
def test_an_engine_that_is_lost_in_the_middle_of_the_weights_is_sent_them_again(
    fake, streaming, prompts, seeds, caplog, fault
):
    sampler, policy = streaming(timeout_seconds=0.7)
    sampler.generate(prompts, seeds)
    change(policy)
    setattr(fake[0], fault, 3)
    with caplog.at_level(logging.WARNING):
        sampler.generate(prompts, seeds)
    assert_has_them(fake[0], policy)
    assert sampler.pool.restarts == 1 and sampler.weights.version == 2
    assert "vLLM engine 0 is lost" in caplog.text and "restart 1 of at most 3" in caplog.text


def test_one_that_is_lost_each_time_ends_the_run_with_one_line(fake, streaming, prompts, seeds, monkeypatch):
    sampler, _ = streaming(timeout_seconds=0.7, restarts=1)

    def gives_up(asked):
        yield {"listens": True}
        fake[0]._receiver = None

    monkeypatch.setattr(fake[0], "receive", gives_up)
    with pytest.raises(TrainingStopped, match=r"started again 1 times before \(vllm.restarts = 1\)"):
        sampler.generate(prompts, seeds)


def test_one_that_comes_back_empty_in_a_rollout_is_sent_the_weights_and_asked_for_what_is_left(
    fake, streaming, prompts, seeds
):
    sampler, policy = streaming()
    usual = fake[0].generate

    def generate(asked):
        yield from usual(asked)
        if fake[0].breaks_off_after is None and len(fake[0].asked) == 1:
            fake[0].version, fake[0].received = 0, {}

    fake[0].generate, fake[0].breaks_off_after = generate, 3
    counts: list[int] = []
    found = sampler.generate(prompts, seeds, counts.append)
    assert [len(asked["rows"]) for asked in fake[0].asked] == [8, 5]
    assert [asked["version"] for asked in fake[0].asked] == [1, 1]
    assert len(found) == 8 and counts == list(range(1, 9))
    assert_has_them(fake[0], policy)


def test_one_that_comes_back_as_it_was_is_not_sent_them_again(fake, streaming, prompts, seeds, monkeypatch):
    sampler, _ = streaming()
    monkeypatch.setattr(sampler.weights, "renew", lambda: pytest.fail("it has them"))
    fake[0].breaks_off_after = 3
    assert len(sampler.generate(prompts, seeds)) == 8
    assert [len(asked["rows"]) for asked in fake[0].asked] == [8, 5]


def test_weights_that_change_under_a_rollout_are_refused(fake, streaming, prompts, seeds):
    sampler, policy = streaming()
    sampler.generate(prompts, seeds)
    change(policy)
    sampler.pool._versions, fake[0].version = [0], 0
    with pytest.raises(ModelError, match="changed while engines wrote by them"):
        sampler.weights.renew()


def test_one_that_serves_another_trainer_by_now_is_refused(fake, streaming, prompts, seeds):
    sampler, policy = streaming()
    sampler.generate(prompts, seeds)
    change(policy)
    fake[0].version = 9
    with pytest.raises(ModelError, match="weights of version 2 came after those of 9"):
        sampler.generate(prompts, seeds)


def test_workers_that_do_not_come_are_not_waited_for_for_ever(fake, monkeypatch):
    monkeypatch.setattr(fake[0], "join", lambda asked: time.sleep(1.0))
    began = time.monotonic()
    with pytest.raises(EngineLost, match="no sign of life"):
        Link(EngineClient(fake[1], "a secret of the tests", timeout_seconds=0.3), "gloo", 1, 0.3)
    assert time.monotonic() - began < 5


def test_nccl_without_a_gpu_is_refused_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"rollout.vllm.transport = nccl: connects GPUs, .* take gloo or folder"):
        check_vllm(VllmConfig(transport="nccl", devices=(1,)), "rollout")


def test_one_that_is_lost_when_it_is_to_listen_is_sent_the_weights_afterwards(
    fake, streaming, prompts, seeds, monkeypatch, caplog
):
    sampler, policy = streaming()
    sampler.generate(prompts, seeds)
    change(policy)
    usual, calls = fake[0].receive, []

    def lost_once(asked):
        calls.append(asked)
        if len(calls) > 1:
            yield from usual(asked)
        else:
            fake[0]._receiver = None

    monkeypatch.setattr(fake[0], "receive", lost_once)
    with caplog.at_level(logging.WARNING):
        sampler.generate(prompts, seeds)
    assert [asked["version"] for asked in calls] == [2, 2] and sampler.pool.restarts == 1
    assert_has_them(fake[0], policy)
