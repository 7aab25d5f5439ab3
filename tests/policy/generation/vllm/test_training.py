"""Responses that are written ahead, without vLLM."""

import threading
import time

import pytest
import torch

from policy.generation.options import SamplingConfig, VllmConfig
from policy.generation.vllm.training import VllmTrainingSampler
from rlhf.core.errors import ModelError, TrainingStopped
from rlhf.data.templates import chat_format
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.ranks import Ranks
from rlhf.models.tokenizer import load_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


@pytest.fixture
def ahead(fake, alone, tiny_policy, tiny_model, tmp_path):
    """A sampler that asks the fake engine, and the policy whose weights it has."""
    policy = tiny_policy()
    config = SamplingConfig(max_new_tokens=4, backend="vllm", vllm=VllmConfig(urls=(fake[1],)))
    chat = chat_format(load_tokenizer(tiny_model), TEMPLATE)
    sampler = VllmTrainingSampler(ReplicatedModel(policy, alone), chat, config, tmp_path)
    yield sampler, policy
    sampler.close()


def change(policy) -> None:
    with torch.no_grad():
        policy.hf.model.norm.weight += 0.5


def test_what_was_begun_comes_from_the_weights_of_then_and_says_so(fake, ahead, prompts, seeds):
    sampler, policy = ahead
    sampler.begin(prompts, seeds)
    change(policy)
    sampler.generate(prompts, seeds)
    assert [asked["version"] for asked in fake[0].asked] == [1]
    assert sampler.staleness == 1
    sampler.generate(prompts, seeds)
    assert [asked["version"] for asked in fake[0].asked] == [1, 2]
    assert sampler.staleness == 0
    assert sampler.metrics() == {"rollout/version": 2.0, "rollout/pushes": 2.0, "rollout/engine_restarts": 0.0}


def test_other_responses_in_between_wait_and_what_was_begun_stays(fake, ahead, prompts, seeds):
    sampler, policy = ahead
    sampler.begin(prompts, seeds)
    change(policy)
    sampler.generate(prompts[:2], [1, 2])  # a held-out evaluation: by the weights of now
    assert sampler.staleness == 0
    sampler.generate(prompts, seeds)
    assert sampler.staleness == 1
    assert [(asked["version"], len(asked["rows"])) for asked in fake[0].asked] == [(1, 8), (2, 2)]


def test_weights_that_did_not_change_are_not_sent(fake, ahead, prompts, seeds):
    sampler, _ = ahead
    for _ in range(3):
        sampler.generate(prompts, seeds)
    assert sampler.weights.pushes == 1 and fake[0].version == 1


def test_versions_go_on_above_those_of_another_run(fake, ahead, prompts, seeds):
    fake[0].version = 41
    sampler, _ = ahead
    sampler.generate(prompts, seeds)
    assert fake[0].version == sampler.weights.version == 42


def test_the_folder_of_the_weights_is_gone_in_the_end(fake, ahead, prompts, seeds, tmp_path):
    sampler, policy = ahead
    for _ in range(3):
        sampler.generate(prompts, seeds)
        change(policy)
    (folder,) = (tmp_path / "weights").iterdir()
    assert folder.name == "version-00000003"
    sampler.close()
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("silent", [False, True], ids=["an engine at work", "an engine that hangs"])
def test_the_end_of_a_run_does_not_wait_for_what_an_engine_elsewhere_was_begun_with(
    fake, ahead, prompts, seeds, silent
):
    sampler, _ = ahead
    goes_on = threading.Event()

    def works_for_long(asked):
        fake[0].asked.append(asked)
        while not goes_on.wait(0.05):
            if not silent:
                yield {"left": len(asked["rows"])}

    fake[0].generate = works_for_long
    sampler.begin(prompts, seeds)
    while not fake[0].asked:
        time.sleep(0.01)
    sampler.close()
    try:
        with pytest.raises(TrainingStopped, match="the engines were ended"):
            sampler._pending.result(timeout=3)
    finally:
        goes_on.set()


def test_a_fault_of_what_was_begun_is_told_when_it_is_asked_for(fake, ahead, prompts, seeds):
    sampler, _ = ahead
    fake[0].answer = lambda place: {"tokens": [5], "logprobs": [None], "ended": True, "versions": ["1"]}
    sampler.begin(prompts, seeds)
    with pytest.raises(ModelError, match="not finite"):
        sampler.generate(prompts, seeds)


def test_a_folder_that_cannot_be_made_is_told_to_all_ranks(ahead, prompts, seeds, tmp_path, monkeypatch):
    """The others would wait for the weights of this one."""
    sampler, _ = ahead
    (tmp_path / "weights").write_text("a file")
    told = []
    together = Ranks.together

    def noted(self, action):
        try:
            return together(self, action)
        except OSError as fault:
            told.append(fault)
            raise

    monkeypatch.setattr(Ranks, "together", noted)
    with pytest.raises(OSError, match="weights"):
        sampler.generate(prompts, seeds)
    assert told
