"""What a step of the stage measures of its responses, and how scores become rewards."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy.ppo.config import (
    AdvantageConfig,
    RolloutConfig,
)
from policy.ppo.reward_options import RewardSourceConfig
from policy.ppo.scoring import Scored
from tests.policy.ppo.by_hand import (
    ONE_MINIBATCH,
    chosen_by_hand,
    experience_of,
    logits_by_hand,
    plain_copy,
    train_of,
)

# What is measured.


@pytest.mark.parametrize("logprobs", ["sampler", "training"])
def test_what_is_measured_is_what_plain_transformers_says(make_task, logprobs):
    sampling = {"max_new_tokens": 10, "temperature": 0.7, "logprobs": logprobs}
    shop = make_task(noise=0.02, rollout=RolloutConfig(prompts=8, samples=2, **sampling))
    hf, base = plain_copy(shop.policy), copy.deepcopy(shop.roles.reference._model.module).plain()
    rollouts = shop.rollouts()
    measured = shop.task._measure(rollouts)
    with torch.no_grad():
        for row in range(len(rollouts)):
            width = len(rollouts.responses[row].tokens)
            distribution = logits_by_hand(hf, rollouts, row, 0.7)
            places = (slice(row, row + 1), slice(0, width))
            for found, expected in (
                (measured.logprobs, chosen_by_hand(hf, rollouts, row, 0.7)),
                (measured.entropies, -(distribution.exp() * distribution).sum(-1)),
                (measured.reference, chosen_by_hand(base, rollouts, row, 0.7)),
            ):
                torch.testing.assert_close(found[places][0], expected, rtol=1e-4, atol=1e-5)
                assert not found[row, width:].any()


@pytest.mark.parametrize(
    ("logprobs", "precision", "asked"),
    [("auto", "float32", 2), ("sampler", "bfloat16", 2), ("auto", "bfloat16", 16), ("training", "float32", 16)],
)
def test_a_sampler_that_is_exact_saves_a_forward_over_the_responses(make_task, tiny_config, logprobs, precision, asked):
    rollout, engine = replace(tiny_config.rollout, logprobs=logprobs), replace(tiny_config.engine, precision=precision)
    shop = make_task(rollout=rollout, engine=engine)
    rollouts, forward, seen = shop.rollouts(), shop.policy.forward, []
    shop.policy.forward = lambda buckets, **options: seen.extend(buckets) or forward(buckets, **options)
    gaps = shop.task._measure(rollouts).sampler_gaps
    assert sum(len(bucket.tokens) for bucket in seen) == asked, "a few are measured to see that the sampler is right"
    assert 0 < len(gaps) <= int(rollouts.mask.sum())


def test_the_kl_of_the_metrics_is_that_of_the_responses(make_task):
    shop = make_task(noise=0.02)
    hf, base = plain_copy(shop.policy), copy.deepcopy(shop.roles.reference._model.module).plain()
    rollouts = shop.rollouts()
    with torch.no_grad():
        ratios = [chosen_by_hand(hf, rollouts, row) - chosen_by_hand(base, rollouts, row) for row in range(16)]
    metrics = shop.step().metrics
    assert metrics["kl"] == pytest.approx(np.mean([float(each.sum()) for each in ratios]), rel=1e-4)
    k3 = [float((torch.exp(-each) - 1 + each).sum()) for each in ratios]
    assert metrics["kl_k3"] == pytest.approx(np.mean(k3), rel=1e-4)
    assert metrics["tokens_per_response"] == np.mean([len(each) for each in ratios])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"top_p": 0.8, "top_k": 50}], ids=str)
def test_the_first_minibatch_starts_where_the_responses_were_drawn(make_task, tiny_config, sampling):
    shop = make_task(
        rollout=replace(tiny_config.rollout, **sampling), train=train_of(tiny_config, **ONE_MINIBATCH), noise=0.02
    )
    metrics = shop.step().metrics
    assert metrics["sampler_gap/max"] < 1e-4
    assert metrics["policy/clip_share"] == 0
    assert abs(metrics["policy/approximate_kl"]) < 1e-9
    assert abs(metrics["policy/loss"]) < 1e-5, "the whitened advantages of a step have mean 0"


def test_advantages_are_whitened_over_all_tokens_of_the_step(make_task, tiny_config):
    small = make_task(noise=0.02, train=train_of(tiny_config, global_batch_size=4, micro_batch_tokens=40))
    experience = experience_of(small)
    tokens = experience.advantages[experience.rollouts.mask]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-5)
    assert float(tokens.std()) == pytest.approx(1, abs=1e-4)
    assert experience.rollouts.response_lengths.unique().numel() > 2, "lengths do not differ: nothing was tested"
    assert not experience.advantages[~experience.rollouts.mask].any()
    plain = make_task(noise=0.02, advantage=AdvantageConfig(estimator="gae", whiten=False))
    assert plain.step().metrics["advantage_deviation"] < 0.9


# How scores become rewards.


def test_a_rule_of_0_to_100_is_not_clipped_unless_asked_for(make_task, text_scorer):
    judge = text_scorer(lambda text: 100 * sum(letter in "aeiou" for letter in text) / max(len(text), 1))
    shop = make_task(scorer=judge)
    experience = experience_of(shop)
    assert torch.equal(experience.rewards, experience.scored.scores)
    share = float((experience.scored.scores > 10).float().mean())
    assert share > 0.2 and shop.step().metrics["clipped_share"] == 0
    clipped = make_task(scorer=judge, reward=RewardSourceConfig(function="rules:length", clip=10.0))
    assert float(experience_of(clipped).rewards.max()) == 10
    assert clipped.step().metrics["clipped_share"] == pytest.approx(share)


def cut_off_at_random(shop, monkeypatch):
    """Rollouts of which some ran into the limit: in one group all, in one all but one."""
    rollouts = shop.rollouts()
    assert rollouts.groups.tolist() == [place for place in range(8) for _ in range(2)]
    cut = {0, 1, 3, 8}
    responses = [replace(each, ended=place not in cut) for place, each in enumerate(rollouts.responses)]
    rollouts = replace(rollouts, responses=responses)
    monkeypatch.setattr(shop.task, "_roll_out", lambda *_: rollouts)
    return rollouts


class Judge:
    """Scores that depend on the text, moved where a response was cut off."""

    identity = "a rule of the test"

    def __init__(self, moved: float) -> None:
        self._moved = moved

    def score(self, rollouts):
        values = torch.tensor([float(len(text)) for text in rollouts.texts])
        values = torch.where(rollouts.ended, values, values + self._moved)
        return Scored(values, values)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "reinforce_pp", "reinforce_pp_baseline"])
@pytest.mark.parametrize(
    ("rule", "differs"),
    [({"truncated": "mask"}, False), ({"truncated": "penalty", "missing_end_penalty": 0.5}, False), ({}, True)],
    ids=["mask", "penalty", "end"],
)
def test_what_a_cut_off_response_is_worth_counts_for_nothing_where_it_should(
    make_task, monkeypatch, estimator, rule, differs
):
    found = []
    for moved in (0.0, 5.0):
        reward = RewardSourceConfig(function="rules:length", **rule)
        shop = make_task(scorer=Judge(moved), reward=reward, advantage=AdvantageConfig(estimator=estimator))
        cut_off_at_random(shop, monkeypatch)
        shop.step()
        found.append(shop.weights() | ({} if shop.critic is None else shop.critic_weights()))
    assert any(not torch.equal(value, found[1][name]) for name, value in found[0].items()) == differs


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_masked_responses_have_no_part_in_the_loss_nor_in_its_mean(make_task, monkeypatch, estimator):
    """The advantages are those of the others alone; of a group with one response left, that one is masked too."""
    reward = RewardSourceConfig(function="rules:length", truncated="mask")
    shop = make_task(scorer=Judge(0.0), reward=reward, advantage=AdvantageConfig(estimator=estimator))
    rollouts = cut_off_at_random(shop, monkeypatch)
    experience = experience_of(shop)
    masked = {0, 1, 3, 8} | ({2, 9} if estimator == "grpo" else set())
    learned = torch.tensor([place not in masked for place in range(16)])
    assert torch.equal(experience.mask, rollouts.mask & learned[:, None])
    assert not experience.advantages[~learned].any()
    if estimator == "gae":
        tokens = experience.advantages[experience.mask]
        assert float(tokens.mean()) == pytest.approx(0, abs=1e-5) and float(tokens.std()) == pytest.approx(1, abs=1e-4)
    metrics = shop.step().metrics
    assert metrics["masked_share"] == pytest.approx(len(masked) / 16)


def test_a_penalty_is_all_of_the_score_of_what_was_cut_off(make_task, monkeypatch):
    reward = RewardSourceConfig(function="rules:length", truncated="penalty", missing_end_penalty=0.5)
    shop = make_task(scorer=Judge(0.0), reward=reward)
    rollouts = cut_off_at_random(shop, monkeypatch)
    experience = experience_of(shop)
    assert torch.equal(experience.rewards, torch.where(rollouts.ended, experience.scored.scores, -0.5))


def test_a_step_of_masked_responses_alone_changes_nothing_and_says_so(make_task, tiny_config):
    rollout = replace(tiny_config.rollout, stop=(), max_new_tokens=3)
    reward = RewardSourceConfig(function="rules:length", truncated="mask")
    shop = make_task(rollout=rollout, reward=reward)
    rollouts = shop.rollouts()
    assert not rollouts.ended.any(), "a response ended: nothing was tested"
    before, critic = shop.weights(), shop.critic_weights()
    outcome = shop.step()
    assert outcome.applied and outcome.metrics["masked_share"] == 1 and outcome.metrics["minibatches"] == 0
    assert all(torch.equal(value, before[name]) for name, value in shop.weights().items())
    assert all(torch.equal(value, critic[name]) for name, value in shop.critic_weights().items())


def test_kl_k3_is_one_quantity_in_training_and_on_held_out_prompts(make_task, tiny_config):
    shop = make_task(noise=0.05, data=replace(tiny_config.data, eval_share=0.4))
    rollouts = shop.task._roll_out([shop.data.evals.prompt(i) for i in range(len(shop.data.evals))], 1, ("held-out",))
    measured = shop.task._measure(rollouts)
    ratios = (measured.logprobs - measured.reference)[rollouts.mask]
    by_hand = float((torch.exp(-ratios) - 1 + ratios).sum()) / len(rollouts)
    shop.task.evaluate()
    assert shop.task.evaluation.kl_k3 == pytest.approx(by_hand, rel=1e-4) and by_hand > 0.01
