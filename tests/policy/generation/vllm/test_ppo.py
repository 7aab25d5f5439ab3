"""PPO and its kin with responses of the real vLLM."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from policy.answers.config import GenerateConfig
from policy.answers.run import generate
from policy.evaluation.options import SamplingSettings
from policy.generation.options import VllmConfig
from tests.conftest import metric_rows

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.dist]
HERE = Path(__file__).resolve().parent
TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


@pytest.fixture
def recipe(tmp_path, wide_model, engine_options):
    """``recipe(output, *settings)``: arguments of a PPO run of four steps by vLLM."""
    words = ["sun", "rain", "day", "tax", "form", "dentist", "write", "one"]
    rows = [{"prompt": " ".join(words[: 1 + number % 5]) + f" {number}"} for number in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(
            {
                "policy": {"path": str(wide_model)},
                "reward": {"function": "rules:share_of_abc"},
                "data": {
                    "train": str(tmp_path / "prompts.jsonl"), "eval_share": 0.2, "template": TEMPLATE,
                    "cache_dir": str(tmp_path / "cache"),
                },
                "rollout": {
                    "prompts": 4, "samples": 2, "max_new_tokens": 8, "backend": "vllm",
                    "vllm": {"python": engine_options.python, "cache_gib": 0.25, "max_model_tokens": 192},
                },
                "advantage": {"estimator": "rloo"},
                "loss": {"epochs": 1},
                "watch": {"action": "none"},
                "optim": {"learning_rate": 0.005, "schedule": "constant", "warmup_share": 0.0},
                "train": {
                    "global_batch_size": 8, "epochs": 2, "max_steps": 4, "checkpoint_every": 2, "evaluate_every": 0,
                    "publish": "none", "tensorboard": False,
                },
                "engine": {"precision": "float32"},
            }
        )
    )  # fmt: skip

    def arguments(output: str, *settings: str) -> list[str]:
        return ["--config", str(tmp_path / "recipe.yaml"), f"output={tmp_path / output}", *settings]

    return arguments


TRANSPORTS = pytest.mark.parametrize("transport", ["rollout.vllm.transport=folder", "rollout.vllm.transport=gloo"])
RULES = {"PYTHONPATH": str(HERE.parents[1] / "ppo")}


@TRANSPORTS
def test_two_ranks_under_zero3_with_adapters_learn_from_what_vllm_writes(run_ranks, recipe, tmp_path, transport):
    settings = (transport, "engine.deepspeed=zero3", "policy.lora.rank=4", "loss.importance=token")
    run_ranks(["-m", "policy.ppo", *recipe("run", *settings)], ranks=2, **RULES)
    rows = metric_rows(tmp_path / "run")
    assert [row["rollout/pushes"] for row in rows] == [1, 2, 3, 4]
    assert (np.diff([row["rollout/version"] for row in rows]) == 1).all()
    for row in rows:
        assert row["sampler_gap/max"] < 1e-3 and row["rollout/staleness"] == 0
        assert row["importance/mean"] == pytest.approx(1, abs=1e-3)


@TRANSPORTS
def test_a_run_that_is_killed_in_a_rollout_goes_on_exactly(run_ranks, recipe, tmp_path, transport):
    run_ranks(["-m", "policy.ppo", *recipe("whole", transport)], ranks=1, **RULES)
    worker = str(HERE.parents[1] / "ppo" / "workers" / "killed.py")
    killed = recipe("killed", transport)
    run_ranks([worker, "policy", "4", *killed], ranks=1, expect=-signal.SIGKILL, **RULES)
    run_ranks(["-m", "policy.ppo", *killed], ranks=1, **RULES)
    whole, resumed = metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "killed")
    skipped = ("rollout/", "time/", "memory/")
    for one, other in zip(whole, resumed[-len(whole) :], strict=True):
        same = {name: value for name, value in one.items() if not name.startswith(skipped)}
        assert {name: other[name] for name in same} == pytest.approx(same, abs=1e-5, rel=1e-5)


@TRANSPORTS
def test_with_learning_rate_0_the_weights_are_never_other_ones(run_ranks, recipe, tmp_path, transport):
    run_ranks(["-m", "policy.ppo", *recipe("probe", transport, "optim.learning_rate=0")], ranks=1, **RULES)
    rows = metric_rows(tmp_path / "probe")
    assert len(rows) == 4
    for row in rows:
        assert row["rollout/pushes"] == 1
        assert abs(row["kl"]) < 1e-4 and row["sampler_gap/max"] < 1e-3


def test_one_step_ahead_is_one_update_behind_and_logged(run_ranks, recipe, tmp_path):
    settings = ("rollout.ahead=1", "loss.importance=token")
    run_ranks(["-m", "policy.ppo", *recipe("ahead", *settings)], ranks=1, **RULES)
    rows = metric_rows(tmp_path / "ahead")
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["sampler_gap/max"] < 1e-3 < rows[2]["sampler_gap/max"]


def test_rounds_of_other_prompts_do_not_hide_that_the_first_one_was_written_ahead(run_ranks, recipe, tmp_path):
    settings = (
        "rollout.ahead=1", "loss.importance=token", "rollout.vllm.engines=2", "rollout.extra_rounds=2",
        "advantage.estimator=grpo", "reward.function=rules:has_an_a", "train.max_steps=3",
    )  # fmt: skip
    run_ranks(["-m", "policy.ppo", *recipe("rounds", *settings)], ranks=1, **RULES)
    rows = metric_rows(tmp_path / "rounds")
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1]
    assert any(row["extra_rounds"] > 0 for row in rows[1:]), rows
    assert all(row["rollout/engine_restarts"] == 0 for row in rows)


def test_answers_of_vllm_are_those_of_the_model(tmp_path, wide_model, engine_options, alone):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"write one sentence about {n}"}) + "\n" for n in range(5)))

    def answers(backend: str) -> list[dict]:
        sampling = SamplingSettings(
            samples=2, max_new_tokens=6, top_k=1, batch_rows=4, backend=backend,
            vllm=VllmConfig(python=engine_options.python, cache_gib=0.25, max_model_tokens=192),
        )  # fmt: skip
        config = GenerateConfig(
            output=tmp_path / backend, model=wide_model, prompts=questions, template=TEMPLATE,
            sampling=sampling,
        )  # fmt: skip
        return [json.loads(line) for line in generate(config, alone).read_text().splitlines()]

    ours, own = answers("vllm"), answers("hf")
    assert [row | {"generator": ""} for row in ours] == [row | {"generator": ""} for row in own] and len(own) >= 5
    assert not list((tmp_path / "vllm" / "vllm" / "weights").iterdir())
