"""Policies compared by a reward on fresh samples."""

import json
import math

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from launch.cli import build_parser
from policy.evaluation import compare
from policy.evaluation.compare import evaluate_policies, read_prompts
from policy.evaluation.options import SamplingSettings
from reward.function import load_reward
from rlhf.core.errors import ConfigError, DataError, ModelError

PROMPTS = [f"write about {word}" for word in ("sun", "rain", "tax", "a good day")]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=6, batch_rows=5)


def length_of(prompts, responses):
    return [float(len(response)) for response in responses]


@pytest.fixture
def moved_model(tiny_model, tiny_tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "moved")
    tiny_tokenizer.save_pretrained(tmp_path / "moved")
    return tmp_path / "moved"


def evaluate(reference, policies, output, reward=length_of, **changes):
    settings = SamplingSettings(**{**SETTINGS.__dict__, **changes})
    return evaluate_policies(policies, reference, PROMPTS, reward, template=None, settings=settings, output=output)


def test_rewards_intervals_and_kl_can_be_made_again_from_the_samples(tiny_model, moved_model, tmp_path):
    base, moved = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples_moved.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert [row["reward"] for row in rows] == length_of(None, [row["response"] for row in rows])
    means = [sum(row["reward"] for row in rows[3 * p : 3 * p + 3]) / 3 for p in range(4)]
    low, high = stats.t.interval(0.95, 3, loc=sum(means) / 4, scale=stats.sem(means))
    assert moved.reward.value == pytest.approx(sum(means) / 4)
    assert (moved.reward.low, moved.reward.high) == pytest.approx((low, high))
    assert moved.gain.value == pytest.approx(moved.reward.value - base.reward.value)
    assert base.gain is None and base.kl == 0


def test_kl_of_samples_is_positive_for_another_model_and_zero_for_a_copy(tiny_model, moved_model, tmp_path):
    _, moved, copy = evaluate(tiny_model, {"moved": moved_model, "copy": tiny_model}, tmp_path / "out", samples=40)
    assert moved.kl > 0.01 and moved.kl_k3 > 0.01
    assert math.isclose(moved.kl, moved.kl_k3, rel_tol=0.5)
    assert copy.kl == copy.kl_k3 == 0


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8}, {"temperature": 0.7}], ids=str)
def test_the_kl_is_that_of_plain_log_probabilities(tiny_model, moved_model, tmp_path, monkeypatch, changes):
    drawn = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "drawn", **changes)[1]
    monkeypatch.setattr(compare, "_own_logprobs", lambda model, samples, _: compare._logprobs(model, samples))
    asked = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "asked", **changes)[1]
    assert (drawn.kl, drawn.kl_k3) == pytest.approx((asked.kl, asked.kl_k3), abs=1e-5)


def test_one_seed_gives_one_result(tiny_model, tmp_path):
    found = [evaluate(tiny_model, {}, tmp_path / str(run), seed=run // 2)[0].reward.value for run in range(4)]
    assert found[0] == found[1] != found[2] == found[3]


def test_what_is_sampled_together_changes_nothing(tiny_model, tmp_path):
    for batch_rows in (1, 5, 12):
        evaluate(tiny_model, {}, tmp_path / str(batch_rows), batch_rows=batch_rows)
    one, *others = ((tmp_path / str(rows) / "samples_reference.jsonl").read_text() for rows in (1, 5, 12))
    assert others == [one, one]


@pytest.mark.parametrize("values", [[1.0], [math.nan] * 12])
def test_a_reward_function_that_miscounts_or_gives_nan_is_refused(tiny_model, tmp_path, values):
    with pytest.raises(DataError, match="12 responses"):
        evaluate(tiny_model, {}, tmp_path, reward=lambda prompts, responses: values)


def test_a_folder_without_a_model_is_named_before_anything_is_sampled(tiny_model, tmp_path):
    with pytest.raises(ModelError, match="nothing: not a model folder"):
        evaluate(tiny_model, {"moved": tmp_path / "nothing"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_no_samples_are_refused_by_the_parser(number, capsys):
    command = ["evaluate", "--reference", "m", "--prompts", "p", "--reward", "a:b", "--output", "o"]
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--samples", number])
    assert "--samples" in capsys.readouterr().err


def test_bad_names_and_files_are_told(tmp_path):
    with pytest.raises(ConfigError, match="expected module:function"):
        load_reward("no.such.module:f")
    with pytest.raises(ConfigError, match="expected module:function"):
        load_reward("math:no_such_function")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: expected an object with a text prompt"):
        read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "nothing.jsonl")
