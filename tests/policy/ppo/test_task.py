"""The step of the stage: its files, and what it does when something is wrong."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy.ppo.config import (
    AdvantageConfig,
)
from policy.ppo.reward_options import RewardSourceConfig
from policy.ppo.rollouts import joined
from policy.ppo.scoring import Scored
from policy.ppo.stage import run
from policy.ppo.update import Updater
from rlhf.core.errors import TrainingStopped
from rlhf.engine.options import EngineConfig
from rlhf.train.batches import BatchMaker
from tests.policy.ppo.by_hand import ONE_MINIBATCH, experience_of, train_of, untimed
from tests.waits import Waits

# Files for people, and what is left of a killed run.


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rollouts_can_be_read(make_task, tiny_config, text_scorer):
    shop = make_task(second=text_scorer(len), rollout=replace(tiny_config.rollout, written=5))
    rollouts = shop.rollouts(0)
    shop.step(0)
    rows = lines(shop.config.output / "rollouts.jsonl")
    assert len(rows) == 5 and {row["step"] for row in rows} == {1}
    for row in rows:
        place = rollouts.row_ids.index(row["row"])
        assert row["response"] == rollouts.texts[place] and row["prompt"] == rollouts.prompts[place].text
        assert row["tokens"] == len(rollouts.responses[place].tokens) and row["second"] == len(row["response"])
        assert row["reward"] == row["score"] == row["rewarded"] and row["kl"] == pytest.approx(0, abs=1e-4)
    assert len({row["row"] for row in rows}) == 5, "a row names its prompt's line and its sample"


def test_a_resumed_run_drops_what_a_killed_one_wrote_later(make_task, tiny_config):
    shop = make_task()
    for number in range(4):
        shop.step(number)
    path = shop.config.output / "rollouts.jsonl"
    straight = lines(path)
    with path.open("a") as handle:
        handle.write('{"step": 5, "row": "cut of')
    resumed = make_task()
    resumed.step(2)
    assert [row["step"] for row in lines(path)] == [1] * 8 + [2] * 8 + [3] * 8
    assert lines(path)[:16] == straight[:16]


def test_a_resumed_run_that_skips_a_step_drops_later_lines_of_both_files(make_task):
    """The first line that a resumed run writes may go into either file: neither keeps what the killed run wrote."""

    class BadOnce:
        identity = "a rule of the test"

        def __init__(self, call):
            self._calls = call

        def score(self, rollouts):
            self._calls -= 1
            values = torch.full((len(rollouts),), 1.0 if self._calls else math.nan)
            return Scored(values, values)

    shop = make_task(scorer=BadOnce(3))
    for number in range(4):
        shop.step(number)
    resumed = make_task(scorer=BadOnce(1))
    resumed.step(1)
    resumed.step(2)
    rows = {name: {row["step"] for row in lines(shop.config.output / f"{name}.jsonl")} for name in FILES}
    assert rows == {"rollouts": {1, 3}, "skipped_rollouts": {2}}


FILES = ("rollouts", "skipped_rollouts")


def test_rollouts_of_a_killed_step_are_not_drawn_again(make_task):
    shop = make_task()
    first = untimed(shop.step(0).metrics)
    again = make_task()
    again.roles.sampler.generate = None  # calling it would fail
    assert untimed(again.step(0).metrics) == first


def test_rollouts_of_another_run_or_half_a_file_are_drawn_anew(make_task):
    shop = make_task()
    first = untimed(shop.step(0).metrics)
    (path,) = (shop.config.output / "replay").glob("step-*")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no zip file at all" * 100):
        path.write_bytes(damaged)
        assert untimed(make_task().step(0).metrics) == first
        assert path.read_bytes() == whole or len(path.read_bytes()) == len(whole)
    state = torch.load(path, weights_only=True)
    state["identity"], state["texts"] = "another", ["wrong"] * 16
    torch.save(state, path)
    assert untimed(make_task().step(0).metrics) == first


def test_how_old_rollouts_are_is_kept_with_them_and_of_two_rounds_the_older_counts(make_task):
    shop = make_task()
    prompts = [shop.data.train.prompt(place) for place in shop.task._places(0)]
    fresh = shop.rollouts(0)
    assert fresh.staleness == 0
    shop.task._replay.put(0, 0, replace(fresh, staleness=1), oldest=0)
    old = shop.task._replay.get(0, 0, prompts)
    assert old.staleness == 1
    both, _ = joined([old, fresh]).of_groups([0, len(prompts)])
    assert both.staleness == 1 and joined([fresh, fresh]).staleness == 0


def test_kept_rollouts_go_once_a_checkpoint_holds_their_step(make_task):
    shop = make_task()
    shop.step(0)
    shop.step(1)
    shop.task.state_dict()
    shop.step(2)
    kept = sorted(path.name for path in (shop.config.output / "replay").glob("step-*"))
    assert kept == ["step-00000002-0.pt"]


# Trouble.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_costs_the_step_and_names_its_row(make_task, bad, text_scorer):
    texts = make_task().rollouts(0).texts
    shop = make_task(scorer=text_scorer(lambda text: bad if text == texts[5] else 0.5))
    names = [name for name, text in zip(shop.rollouts(0).row_ids, texts, strict=True) if text == texts[5]]
    policy, critic = shop.weights(), shop.critic_weights()
    outcome = shop.step(0)
    assert not outcome.applied and not outcome.scaler_overflow and not outcome.end
    assert all(torch.equal(value, policy[name]) for name, value in shop.weights().items())
    assert all(torch.equal(value, critic[name]) for name, value in shop.critic_weights().items())
    (entry,) = lines(shop.config.output / "skipped.jsonl")
    assert entry["step"] == 1 and entry["rows"] == names and "score" in entry["not_finite"]
    rows = lines(shop.config.output / "skipped_rollouts.jsonl")
    assert [row["row"] for row in rows] == names
    assert rows[0]["response"] == texts[5] and rows[0]["reward"] == str(bad)
    assert not (shop.config.output / "rollouts.jsonl").exists()


def test_a_policy_that_is_not_finite_costs_the_step(make_task):
    shop = make_task()
    rollouts = shop.rollouts(0)
    shop.task._replay.put(0, 0, rollouts, oldest=0)
    with torch.no_grad():
        shop.policy.module.hf.get_output_embeddings().weight[7] = math.nan
    assert not shop.step(0).applied
    (entry,) = lines(shop.config.output / "skipped.jsonl")
    assert "logprobs" in entry["not_finite"] and len(entry["rows"]) == 16


def test_a_gradient_that_is_not_finite_drops_its_minibatch_alone(make_task, tiny_config):
    shop = make_task(advantage=AdvantageConfig(estimator="grpo"))
    backward, calls = shop.policy.backward, []

    def once_bad(loss, *, last):
        calls.append(last)
        backward(loss * (math.nan if len(calls) == 1 else 1.0), last=last)

    shop.policy.backward = once_bad
    before = shop.weights()
    outcome = shop.step(0)
    assert not outcome.applied
    (entry,) = lines(shop.config.output / "skipped.jsonl")
    assert len(entry["rows"]) == 8, "the rows of one minibatch of two"
    now = shop.weights()
    assert any(not torch.equal(value, before[name]) for name, value in now.items())
    assert all(bool(torch.isfinite(value).all()) for value in now.values())


def test_a_run_of_bad_rewards_stops(tiny_config, alone):
    config = replace(
        tiny_config,
        reward=RewardSourceConfig(function="rules:one_not_a_number"),
        data=replace(tiny_config.data, eval_share=0.0),
        engine=EngineConfig(kind="local", max_skipped_steps=2),
    )
    with pytest.raises(TrainingStopped, match=r"2 steps in a row \(up to step 2\)"):
        run(config, alone)
    assert [entry["step"] for entry in lines(config.output / "skipped.jsonl")] == [1, 2]


def test_held_out_rewards_that_are_not_finite_stop_the_run_and_name_a_row(make_task, text_scorer):
    shop = make_task(scorer=text_scorer(lambda text: math.nan))
    with pytest.raises(TrainingStopped, match=r"prompts\.jsonl:\d+"):
        shop.task.evaluate()


def always_ends(model):
    """The end token, whatever came before."""
    head = model.hf.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[2] = 60.0


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "reinforce_pp"])
def test_a_policy_that_writes_nothing_trains_on(make_task, estimator):
    shop = make_task(change=always_ends, advantage=AdvantageConfig(estimator=estimator))
    for number in range(2):
        outcome = shop.step(number)
        assert outcome.applied
        assert outcome.metrics["empty_share"] == outcome.metrics["ended_share"] == 1
        assert outcome.metrics["tokens_per_response"] == 1
        assert outcome.metrics["score_deviation"] == 0
        assert all(math.isfinite(value) for value in outcome.metrics.values())
    assert all(bool(torch.isfinite(value).all()) for value in shop.weights().values())
    assert {row["response"] for row in lines(shop.config.output / "rollouts.jsonl")} == {""}
    metrics = shop.task.evaluate()
    assert metrics["eval/tokens"] == 1 and metrics["eval/ended_share"] == 1


def test_empty_responses_beside_long_ones_are_counted(make_task, tiny_config):
    def sometimes_ends(model):
        always_ends(model)
        with torch.no_grad():
            model.hf.get_output_embeddings().bias[2] = 5.0

    shop = make_task(change=sometimes_ends, rollout=replace(tiny_config.rollout, stop=()))
    rollouts = shop.rollouts(0)
    share = np.mean([response.tokens.tolist() == [2] for response in rollouts.responses])
    assert 0 < share < 1
    assert shop.step(0).metrics["empty_share"] == pytest.approx(share)


# Held-out evaluation.


def test_held_out_prompts_are_answered_from_the_same_seeds_each_time(make_task, text_scorer):
    shop = make_task(noise=0.02, second=text_scorer(len))
    first, again = shop.task.evaluate(), shop.task.evaluate()
    assert first == again and first["eval/score"] == first["eval/selection"]
    assert shop.task.evaluation.prompts == len(shop.data.evals) == 8
    assert first["eval/second"] > 0 and first["eval/kl"] != 0
    shop.step(0)
    assert shop.task.evaluate() != first


def test_held_out_metrics_do_not_depend_on_the_token_budget(make_task, tiny_config):
    found = [
        make_task(noise=0.02, train=train_of(tiny_config, micro_batch_tokens=budget)).task.evaluate()
        for budget in (40, 5000)
    ]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert math.isclose(value, found[1][name], rel_tol=1e-4, abs_tol=1e-5), name


def test_the_host_waits_for_an_update_as_often_as_there_are_engines(make_task, tiny_config, monkeypatch):
    """For the length of the gradient and the sums over tokens of each, however many micro-batches there are."""
    found = []
    for budget in (60, 5000):
        shop = make_task(train=train_of(tiny_config, micro_batch_tokens=budget, **ONE_MINIBATCH))
        experience, make = experience_of(shop), BatchMaker.step
        parameters = [*shop.policy.module.parameters(), *shop.critic.module.parameters()]
        with Waits(parameters) as waits, monkeypatch.context() as patch:

            def marked(maker, data, number, waits=waits, make=make, **options):
                batches = make(maker, data, number, **options)
                waits.mark(batches)
                waits.batches = len(batches)
                return batches

            patch.setattr(BatchMaker, "step", marked)
            Updater(shop.policy, shop.critic, shop.config).run(0, experience, 0.1)
        found.append((waits.batches, waits.places))
    (many, places), (one, _) = found
    assert many > 3 and one == 1
    assert [len(each) for _, each in found] == [4, 4], "\n".join(places)
