"""Engines that die, hang, lie or have other weights, without vLLM."""

import logging
import math
import os
import socket
import subprocess
import threading
import urllib.parse
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from policy.generation.options import SamplingConfig, VllmConfig
from policy.generation.vllm.client import EngineClient, EngineRefused, Weights
from policy.generation.vllm.engine import margin_engine
from policy.generation.vllm.engine.margin_engine import TOKEN_VARIABLE, Handler, tensor_sum, weight_sums
from policy.generation.vllm.pool import EnginePool, spread
from policy.generation.vllm.process import check_vllm
from policy.generation.vllm.sampler import Share, VllmSampler, launch_of, tells_logprobs, vllm_settings
from rlhf.core.errors import ConfigError, ModelError, TrainingStopped

SETTINGS = {"max_tokens": 4}


def test_rows_go_to_engines_by_length_the_longest_first():
    lengths = [5, 90, 10, 80, 20, 15]
    shares = spread(lengths, 2)
    assert sorted(place for share in shares for place in share) == list(range(6))
    loads = [sum(lengths[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= 10
    assert spread([3], 3) == [[0], [], []]


def test_every_row_gets_its_own_response(fake_pool, rows):
    counts: list[int] = []
    answers = fake_pool().generate(rows, SETTINGS, counts.append)
    assert [answer["tokens"] for answer in answers] == [[5 + place] for place in range(len(rows))]
    assert counts == list(range(1, len(rows) + 1))


def test_rollouts_of_another_version_are_refused(fake, fake_pool, rows):
    pool = fake_pool()
    fake[0].version = 7  # another trainer has pushed
    with pytest.raises(ModelError, match="asked for version 1, the engine has 7"):
        pool.generate(rows, SETTINGS)


def test_a_response_that_other_weights_wrote_in_part_is_refused(fake, fake_pool, rows):
    pool = fake_pool()
    fake[0].answer = lambda place: {"tokens": [1, 2], "logprobs": [-1.0, -1.0], "ended": True, "versions": ["0", "1"]}
    with pytest.raises(ModelError, match="by weights of version 0, 1; asked was version 1"):
        pool.generate(rows, SETTINGS)


def test_an_engine_that_says_it_has_other_checksums_is_refused(fake, fake_pool, tmp_path, monkeypatch):
    pool = fake_pool()
    monkeypatch.setattr(fake[0], "update", lambda asked: {"version": asked["version"], "sums": {"0": "cd"}})
    with pytest.raises(ModelError, match="checksums that are not those of version 2 in training"):
        pool.set_weights(Weights(tmp_path, 2, {"0": "ab"}))


def test_an_engine_that_forgot_a_push_is_refused(fake, fake_pool, tmp_path, monkeypatch):
    pool = fake_pool()
    monkeypatch.setattr(fake[0], "update", lambda asked: {"version": 1, "sums": asked["sums"]})
    with pytest.raises(ModelError, match="has weights of version 1"):
        pool.set_weights(Weights(tmp_path, 2, {"0": "ab"}))


def test_weights_that_come_out_of_order_are_refused(fake_pool, tmp_path):
    pool = fake_pool()
    pool.set_weights(Weights(tmp_path, 3, {"0": "ab"}))
    with pytest.raises(ModelError, match="weights of version 2 came after those of 3"):
        pool.set_weights(Weights(tmp_path, 2, {"0": "ab"}))


def test_a_stream_that_breaks_off_is_asked_for_what_is_left(fake, fake_pool, rows, caplog):
    pool = fake_pool()
    fake[0].breaks_off_after = 3
    with caplog.at_level(logging.WARNING):
        answers = pool.generate(rows, SETTINGS)
    assert len(answers) == len(rows) and pool.restarts == 1
    assert [len(asked["rows"]) for asked in fake[0].asked] == [8, 5]
    assert "ended with 5 of 8 responses to go" in caplog.text and "restart 1 of at most 3" in caplog.text


def test_an_engine_that_hangs_is_given_up_and_asked_again(fake, fake_pool, rows, caplog):
    pool = fake_pool(timeout_seconds=0.3)
    fake[0].hangs = 1
    with caplog.at_level(logging.WARNING):
        assert len(pool.generate(rows, SETTINGS)) == len(rows)
    assert "gives no sign of life" in caplog.text


def breaks_off(engine, version: int) -> None:
    """An engine that is lost in its next answer, and has other weights when it is back."""
    engine.breaks_off_after = 3
    usual = engine.generate

    def generate(asked):
        yield from usual(asked)
        engine.version = version

    engine.generate = generate


def test_an_engine_elsewhere_that_comes_back_empty_gets_the_weights_of_now(fake, fake_pool, rows):
    pool = fake_pool()
    breaks_off(fake[0], version=0)
    assert len(pool.generate(rows, SETTINGS)) == len(rows)
    assert [asked["version"] for asked in fake[0].asked] == [1, 1] and pool.restarts == 1


def test_an_engine_elsewhere_that_serves_another_trainer_by_now_is_refused(fake, fake_pool, rows):
    pool = fake_pool()
    breaks_off(fake[0], version=9)
    with pytest.raises(ModelError, match="weights of version 1 came after those of 9"):
        pool.generate(rows, SETTINGS)


def test_a_run_stops_with_one_line_when_engines_are_lost_too_often(fake, fake_pool, rows):
    pool = fake_pool(timeout_seconds=0.2, restarts=1)
    fake[0].hangs = 99
    with pytest.raises(TrainingStopped, match=r"started again 1 times before \(vllm.restarts = 1\)"):
        pool.generate(rows, SETTINGS)


def test_an_answer_of_somebody_else_is_no_engine(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(fake[0], "state", lambda: {"status": "ok"})
    config = SamplingConfig(backend="vllm", vllm=VllmConfig(urls=(fake[1],)))
    with pytest.raises(ConfigError, match="is no engine of this toolkit"):
        EnginePool(launch_of(config, dtype=torch.float32, folder=tmp_path, tokenizer=tmp_path)).newest_version()


def test_a_wrong_secret_is_refused(fake):
    with pytest.raises(EngineRefused, match=TOKEN_VARIABLE):
        EngineClient(fake[1], "another", timeout_seconds=5.0).state()


@pytest.mark.parametrize("path", ["/update", "/generate"])
def test_what_knows_no_secret_or_is_no_json_ends_no_engine(fake, path):
    secret = os.environ[TOKEN_VARIABLE]
    stranger = httpx.post(fake[1] + path, content=b"GET / garbage", headers={"Authorization": b"Bearer \xe9"})
    assert stranger.status_code == 401
    ours = httpx.post(fake[1] + path, content=b"{", headers={"Authorization": f"Bearer {secret}"})
    assert ours.status_code == 400 and "no JSON" in ours.json()["error"]
    assert EngineClient(fake[1], secret, timeout_seconds=5.0).state()["version"] == 0


def test_a_connection_that_asks_nothing_keeps_others_out_for_a_while_only(fake, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.3)
    address = urllib.parse.urlsplit(fake[1])
    with socket.create_connection((address.hostname, address.port)) as silent:
        silent.sendall(b"POST /update HTTP/1.0\r\nContent-Length: 9\r\n\r\n")
        assert EngineClient(fake[1], os.environ[TOKEN_VARIABLE], timeout_seconds=3.0).state()["version"] == 0


@pytest.fixture
def sampler(fake_pool, alone, tiny_tokenizer):
    return lambda **sampling: VllmSampler(
        alone,
        fake_pool(),
        SamplingConfig(**{"max_new_tokens": 4, **sampling}),
        eos_token_ids=(2,),
        tokenizer=tiny_tokenizer,
    )


def test_progress_is_told_by_rank_although_one_rank_asks_for_all(fake_pool, alone, tiny_tokenizer, rows):
    counts: list[int] = []
    two = replace(alone, world_size=2)
    sampler = VllmSampler(
        two, fake_pool(), SamplingConfig(max_new_tokens=4), eos_token_ids=(2,), tokenizer=tiny_tokenizer
    )
    sampler.ask(Share(list(rows), 0, len(rows)), counts.append)
    assert counts == [-(-count // 2) for count in range(1, len(rows) + 1)]


def test_log_probabilities_that_are_not_finite_stop_the_run(fake, sampler, prompts, seeds):
    fake[0].answer = lambda place: {
        "tokens": [5],
        "logprobs": [None if place == 2 else -1.0],
        "ended": False,
        "versions": ["1"],
    }
    with pytest.raises(ModelError, match="1 of 8 responses of vLLM have log-probabilities that are not finite"):
        sampler().generate(prompts, seeds)


def test_what_the_engine_cannot_tell_is_not_a_number(sampler, prompts, seeds):
    plain, cut = (sampler(**each).generate(prompts, seeds)[0] for each in ({}, {"top_p": 0.5, "temperature": 0.7}))
    assert plain.logprobs.tolist() == [-1.0] and math.isnan(plain.entropies[0])
    assert math.isnan(cut.logprobs[0])
    assert tells_logprobs(SamplingConfig(top_p=0.5)) and tells_logprobs(SamplingConfig(temperature=0.7))


def test_a_prompt_that_is_too_long_for_the_engine_says_so(sampler, seeds):
    with pytest.raises(ConfigError, match="come to 65 tokens, the vLLM engine takes 64"):
        sampler().generate([np.arange(3, 64)], seeds[:1])


def test_a_response_ends_where_the_own_sampler_would_end_it(fake, sampler, tiny_tokenizer):
    tokens = tiny_tokenizer("a sun b rain", add_special_tokens=False)["input_ids"]
    row = {"tokens": tokens, "logprobs": [-1.0] * len(tokens), "ended": False, "versions": ["1"]}
    fake[0].answer = lambda place: row
    (found,) = sampler(stop=("b",), max_new_tokens=20).generate([np.array([4])], [0])
    assert tiny_tokenizer.decode(found.tokens).endswith("b") and found.ended


def test_greedy_is_asked_for_in_vllms_words():
    settings = vllm_settings(SamplingConfig(top_k=1, temperature=0.7), (2,), 1.0)
    assert (settings["temperature"], settings["top_k"], settings["stop_token_ids"]) == (0.0, 0, [2])


def test_without_vllm_one_line_says_what_to_install():
    with pytest.raises(ConfigError, match=r"rollout.backend = vllm: .* has no vLLM; install .*margin-rlhf\[vllm\]"):
        check_vllm(VllmConfig(), "rollout")


@pytest.mark.parametrize("without", [(), ("pidfd_open",)], ids=["told", "asked"])
def test_an_engine_ends_with_its_trainer_be_there_a_script_between_them_or_not(monkeypatch, without):
    for name in without:
        monkeypatch.delattr(margin_engine.os, name)
    ended = threading.Event()
    monkeypatch.setattr(margin_engine.os, "_exit", lambda status: ended.set())
    trainer = subprocess.Popen(["sleep", "60"])  # not the parent of what watches it
    threading.Thread(target=margin_engine._watch, args=(trainer.pid,), daemon=True).start()
    assert not ended.wait(0.8)
    trainer.kill()
    if without:
        trainer.wait()
    assert ended.wait(3)
    trainer.wait()


def test_engines_elsewhere_are_not_asked_without_their_secret(monkeypatch):
    config = VllmConfig(urls=("http://h:1", "http://h:2"))
    monkeypatch.setenv(TOKEN_VARIABLE, "x")
    check_vllm(config, "rollout")
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(ConfigError, match=rf"rollout.vllm.urls = http://h:1, http://h:2: {TOKEN_VARIABLE} is not set"):
        check_vllm(config, "rollout")


def test_a_python_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"vllm.python = .*/none: cannot be started"):
        check_vllm(VllmConfig(python=str(tmp_path / "none")), "rollout")


def test_checksums_see_a_changed_bit_and_a_missing_weight_and_do_not_see_padding():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    other[3, 3] = torch.nextafter(other[3, 3], torch.tensor(torch.inf))
    assert tensor_sum(weight) != tensor_sum(other)
    assert tensor_sum(torch.cat([weight, torch.zeros(3, 7)])) == tensor_sum(weight)
    halves = [("layers.4.q.weight", weight[:2]), ("layers.4.k.weight", weight[2:])]
    assert weight_sums(halves) == weight_sums([("layers.4.qkv.weight", weight)])
    assert weight_sums(halves) != weight_sums(halves[:1])
    swapped = [("layers.4.w", weight), ("layers.5.w", other)], [("layers.4.w", other), ("layers.5.w", weight)]
    assert weight_sums(swapped[0]) != weight_sums(swapped[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checksums_are_of_bits(dtype):
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = weight.clone()
    moved[0] = -moved[0]
    assert tensor_sum(weight) == tensor_sum(weight[torch.randperm(64)]) != tensor_sum(moved)


def test_engines_and_devices_must_agree():
    with pytest.raises(ValueError, match="expected engines x tensor_parallel = 4"):
        VllmConfig(engines=2, tensor_parallel=2, devices=(0, 1))


@pytest.mark.parametrize(
    "setting", [{"engines": 2}, {"tensor_parallel": 2}, {"python": "x"}, {"cache_gib": 2.0}, {"max_model_tokens": 9}]
)
def test_what_engines_elsewhere_were_started_with_cannot_be_set(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"as they were started: leave {name} out"):
        VllmConfig(urls=("http://x",), **setting)
    VllmConfig(urls=("http://x",), timeout_seconds=9.0, restarts=1, sleep=True, folder="x")  # these have an effect


def test_engine_code_needs_neither_this_toolkit_nor_vllm_to_be_read():
    text = (Path(__file__).parents[4] / "policy/generation/vllm/engine/margin_engine.py").read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "policy" in line or "rlhf" in line or "vllm" in line]
