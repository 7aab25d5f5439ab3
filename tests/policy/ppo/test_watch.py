"""Tripwires on made-up metrics, and how the best checkpoint is chosen."""

import logging

import numpy as np
import pytest
import torch

from policy.generation.api import Response
from policy.ppo.config import WatchConfig
from policy.ppo.reports import held_out
from policy.ppo.rollouts import Rollouts
from policy.ppo.scoring import Scored
from policy.ppo.watch import Watch
from rlhf.core.errors import TrainingStopped

HEALTHY = {
    "kl": 2.0,
    "score": 0.1,
    "score_deviation": 0.8,
    "tokens_per_response": 40.0,
    "ended_share": 0.9,
    "repetition": 0.05,
    "length_correlation": 0.2,
    "second": 1.0,
    "second_deviation": 0.5,
    "sampler_gap/mean": 0.01,
}

SYMPTOMS = {
    "samples of another policy": (
        {"sampler_gap/mean": 0.7},
        ["nats a token off those of training (watch.sampler_gap = 0.1)", "policy.attention=eager"],
    ),
    "far from the reference": (
        {"kl": 60.0},
        ["nats per response from the reference", "left the texts that the reward model knows", "kl.coefficient"],
    ),
    "much longer": (
        {"tokens_per_response": 200.0},
        ["responses have", "at the start 40", "pays for length", "reward.length_penalty"],
    ),
    "much shorter": ({"tokens_per_response": 4.0}, ["responses have", "at the start 40", "kl.coefficient"]),
    "no ends": (
        {"ended_share": 0.1},
        ["of the responses end by themselves, at the start 90%", "reward.missing_end_penalty"],
    ),
    "loops": ({"repetition": 0.95}, ["4-grams of a response repeat", "the policy loops", "kl.coefficient"]),
    "nothing to learn": (
        {"score_deviation": 0.0},
        ["standard deviation", "nothing tells responses apart", "rollout.temperature"],
    ),
    "score follows length": (
        {"length_correlation": -0.99},
        ["score and response length correlate", "the policy learns length", "reward.length_penalty"],
    ),
    "reward up, second scorer down": (
        {"second": 0.2, "score": 3.0},
        ["the second scorer has fallen", "exploits the reward model", "reward.combine=min"],
    ),
}


def look(watch, change, start=1, steps=15):
    for step in range(start, start + steps):
        watch.look(step, HEALTHY | change)


def watch_of(alone, action="warn", **settings):
    watch = Watch(WatchConfig(action=action, **settings), alone)
    look(watch, {}, steps=3)
    return watch


@pytest.mark.parametrize("name", SYMPTOMS)
def test_a_symptom_is_told_once_with_its_cause_and_the_setting(alone, caplog, name):
    change, words = SYMPTOMS[name]
    watch = watch_of(alone)
    look(watch, change, start=4, steps=40)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message.startswith("step ")
    assert all(word in record.message for word in words), record.message
    assert not watch.tripped


def test_health_is_no_symptom(alone, caplog):
    look(watch_of(alone, action="stop"), {}, start=4, steps=30)
    assert not caplog.records


def test_a_steady_second_scorer_may_fall_while_the_reward_falls(alone, caplog):
    look(watch_of(alone), {"second": 0.0, "score": -2.0}, start=4)
    assert not caplog.records


@pytest.mark.parametrize("name", SYMPTOMS)
def test_one_odd_step_is_no_symptom(alone, caplog, name):
    """A little beyond the limit, for one step."""
    mild = {
        "sampler_gap/mean": 0.3,
        "kl": 30.0, "tokens_per_response": 90.0 if name == "much longer" else 15.0, "ended_share": 0.3,
        "repetition": 0.7, "score_deviation": 0.0, "length_correlation": -0.95, "second": 0.6, "score": 0.6,
    }  # fmt: skip
    change = {key: mild[key] for key in SYMPTOMS[name][0]}
    watch = watch_of(alone)
    look(watch, change, start=4, steps=1)
    look(watch, {}, start=5)
    assert not caplog.records


def test_stop_stops(alone):
    watch = watch_of(alone, action="stop")
    with pytest.raises(TrainingStopped, match=r"step \d+: the policy is .* nats.*checkpoints are intact"):
        look(watch, {"kl": 60.0}, start=4)


def test_best_ends_the_run_and_says_so_once(alone, caplog):
    watch = watch_of(alone, action="best")
    look(watch, {"kl": 60.0}, start=4)
    assert watch.tripped
    assert "ending the run and taking the best checkpoint" in caplog.text and len(caplog.records) == 1


def test_none_says_nothing(alone, caplog):
    watch = watch_of(alone, action="none")
    look(watch, {"kl": 60.0, "repetition": 1.0}, start=4)
    assert not watch.tripped and not caplog.records


def test_limits_are_those_of_the_recipe(alone, caplog):
    watch = watch_of(alone, kl_budget=100.0, repetition=0.99, length_factor=10.0)
    look(watch, {"kl": 60.0, "repetition": 0.95, "tokens_per_response": 200.0}, start=4, steps=40)
    assert not caplog.records


def test_metrics_that_are_missing_or_not_a_number_are_passed_over(alone, caplog):
    watch = watch_of(alone, action="stop")
    partial = {name: value for name, value in HEALTHY.items() if not name.startswith("second")}
    watch.look(4, partial | {"length_correlation": float("nan"), "kl": float("nan")})
    watch.look(5, HEALTHY)
    assert not caplog.records


def test_a_saved_watch_goes_on_as_if_it_had_never_stopped(alone, caplog):
    drifting = {"tokens_per_response": 75.0, "kl": 19.0, "second": 0.8, "score": 0.5}
    straight, first = watch_of(alone), watch_of(alone)
    look(straight, drifting, start=4, steps=6)
    look(first, drifting, start=4, steps=6)
    resumed = Watch(WatchConfig(), alone)
    resumed.load_state_dict(first.state_dict())
    caplog.clear()
    worse = {"tokens_per_response": 120.0, "kl": 21.0, "second": 0.3, "score": 0.9}
    look(straight, worse, start=10, steps=12)
    expected = [record.message for record in caplog.records]
    assert len(expected) == 3
    caplog.clear()
    look(resumed, worse, start=10, steps=12)
    assert [record.message for record in caplog.records] == expected
    caplog.clear()
    again = Watch(WatchConfig(), alone)
    again.load_state_dict(resumed.state_dict())
    look(again, worse, start=22)
    assert not caplog.records, "what has been said is not said again"


# The best checkpoint.


def summed_up(score: float, kl: float, budget: float = 20.0, second: float | None = None):
    values = torch.tensor([score - 0.5, score + 0.5, score])
    scorer = None if second is None else Scored(values + second, values + second)
    logprobs = torch.zeros(3, 5)
    logprobs[:, :2] = torch.tensor([kl - 1, kl + 1, kl])[:, None] / 2
    return held_out(
        three_rollouts(), Scored(10 * values, values), scorer, logprobs, torch.zeros(3, 5), kl_budget=budget
    )


def three_rollouts() -> Rollouts:
    responses = [
        Response(np.arange(count), *np.zeros((2, count), np.float32), ended)
        for count, ended in ((3, True), (4, False), (5, True))
    ]
    return Rollouts([], responses, ["a", "b", "c"], torch.arange(3))


def test_within_the_budget_the_score_decides():
    better, worse = summed_up(1.5, kl=19.0), summed_up(1.0, kl=2.0)
    assert better.selection == pytest.approx(1.5) and better.selection > worse.selection


def test_any_policy_within_the_budget_beats_any_beyond_it():
    near, far, farther = summed_up(-500.0, kl=19.9), summed_up(1000.0, kl=20.1), summed_up(2000.0, kl=25.0)
    assert near.selection > far.selection > farther.selection
    assert summed_up(1000.0, kl=20.1, budget=30.0).selection == pytest.approx(1000.0)


def test_held_out_numbers_are_means_over_prompts():
    found = summed_up(1.0, kl=2.0, second=3.0)
    metrics = found.metrics()
    assert metrics["eval/score"] == pytest.approx(1.0) and metrics["eval/reward"] == pytest.approx(10.0)
    assert metrics["eval/second"] == pytest.approx(4.0) and metrics["eval/kl"] == pytest.approx(2.0)
    assert metrics["eval/tokens"] == 4 and metrics["eval/ended_share"] == pytest.approx(2 / 3)
    assert found.reward.low < 10.0 < found.reward.high and found.prompts == 3
    assert "eval/second" not in summed_up(1.0, kl=2.0).metrics()
