import itertools
import math

import numpy as np
import pytest
import torch

from policy.ppo.advantages import (
    clip_scores,
    gae,
    group_means,
    grpo,
    length_penalty,
    missing_end_penalty,
    rewards_to_go,
    rloo,
    spread,
    token_rewards,
    whiten,
)
from policy.ppo.estimators import ESTIMATORS
from rlhf.core.masking import length_mask

LENGTHS = (5, 1, 3, 4, 2)
MASK = length_mask(torch.tensor(LENGTHS), 6)
GROUPS = torch.tensor([70, 3, 70, 3, 70])
SCORES = torch.tensor([1.0, -2.0, 4.0, 0.5, 2.5], dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spoiled(tensor, mask=MASK):
    return torch.where(mask, tensor, 1e6)


# Rewards.


def test_scores_are_cut_off_on_both_sides():
    assert clip_scores(torch.tensor([-7.0, -1.0, 7.0]), 5.0).tolist() == [-5, -1, 5]


def test_only_a_response_without_an_end_is_penalized():
    found = missing_end_penalty(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), 5.0)
    assert found.tolist() == [1, -3]


def test_the_length_penalty_by_hand():
    lengths = torch.tensor([0, 100, 125, 150, 200, 999])
    found = length_penalty(lengths, free_tokens=100, max_tokens=200, penalty=2.0)
    assert found.tolist() == [0, 0, -0.5, -1, -2, -2]


def test_the_length_penalty_is_dapo_s_equation_for_every_length():
    longest, cache = 20, 8
    found = length_penalty(torch.arange(31), free_tokens=longest - cache, max_tokens=longest, penalty=1.0)
    for length, value in enumerate(found.tolist()):
        if length <= longest - cache:
            expected = 0
        elif length <= longest:
            expected = ((longest - cache) - length) / cache
        else:
            expected = -1
        assert value == pytest.approx(expected)


def test_token_rewards_by_hand():
    mask = length_mask(torch.tensor([3, 1]), 3)
    kl = torch.tensor([[1.0, -2.0, 3.0], [4.0, 99.0, 99.0]])
    found = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, 0.5)
    assert found.tolist() == [[-0.5, 1.0, 8.5], [18.0, 0.0, 0.0]]
    assert token_rewards(torch.tensor([10.0, 20.0]), None, mask, 0.5).tolist() == [[0, 0, 10], [20, 0, 0]]


def test_rewards_of_a_response_add_up_to_its_score_less_its_penalty():
    kl = randn(5, 6)
    found = token_rewards(SCORES, spoiled(kl), MASK, 0.3)
    torch.testing.assert_close(found.sum(dim=1), SCORES - 0.3 * (kl * MASK).sum(dim=1))
    assert found[~MASK].abs().max() == 0


def test_a_score_that_no_token_would_carry_is_refused():
    with pytest.raises(ValueError, match=r"rows without a token: \[1\]"):
        token_rewards(torch.ones(2), None, length_mask(torch.tensor([3, 0]), 3), 0.1)


# Advantages of tokens.


def gae_by_loops(rewards, values, lengths, gamma, lam):
    """The sum of the paper, term by term."""
    advantages = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        for t in range(length):
            for later in range(t, length):
                following = values[row, later + 1] if later + 1 < length else 0.0
                delta = rewards[row, later] + gamma * following - values[row, later]
                advantages[row, t] += (gamma * lam) ** (later - t) * delta
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.7, 0.0), (0.0, 1.0)])
def test_gae_is_the_double_sum_of_the_paper_on_ragged_rows(gamma, lam):
    rewards, values = randn(5, 6), randn(5, 6, seed=1)
    advantages, returns = gae(spoiled(rewards), spoiled(values), MASK, gamma=gamma, lam=lam)
    expected = torch.from_numpy(gae_by_loops(rewards.numpy(), values.numpy(), LENGTHS, gamma, lam))
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * MASK)


def test_lambda_zero_is_the_one_step_error_and_lambda_one_the_return_less_the_value():
    rewards, values = randn(5, 6), randn(5, 6, seed=1)
    following = torch.cat([(values * MASK)[:, 1:], torch.zeros(5, 1, dtype=torch.float64)], dim=1)
    one_step, _ = gae(rewards, values, MASK, gamma=0.8, lam=0.0)
    torch.testing.assert_close(one_step, (rewards + 0.8 * following - values) * MASK)
    whole, returns = gae(rewards, values, MASK, gamma=0.8, lam=1.0)
    to_go = rewards_to_go(rewards, MASK, 0.8)
    torch.testing.assert_close(whole, (to_go - values) * MASK)
    torch.testing.assert_close(returns, to_go)


def test_constant_rewards_and_values_give_a_geometric_sum():
    gamma, lam, reward, value, length = 0.9, 0.8, 2.0, 0.5, 7
    ones = torch.ones(1, length, dtype=torch.float64)
    found, _ = gae(reward * ones, value * ones, ones.bool(), gamma=gamma, lam=lam)
    rate, delta = gamma * lam, reward + gamma * value - value
    for t, advantage in enumerate(found[0].tolist()):
        left = length - t
        inner = delta * (1 - rate**left) / (1 - rate)
        assert advantage == pytest.approx(inner - gamma * value * rate ** (left - 1))


def test_a_critic_that_knows_the_returns_leaves_no_advantage():
    rewards = randn(5, 6)
    values = rewards_to_go(rewards, MASK, 0.9)
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    torch.testing.assert_close(returns, values)


def test_rewards_to_go_by_hand():
    found = rewards_to_go(torch.tensor([[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]]), length_mask(torch.tensor([3, 1]), 3), 0.5)
    assert found.tolist() == [[3, 4, 4], [8, 0, 0]]


def test_tokens_after_padding_are_refused_where_order_matters():
    mask = torch.tensor([[True, False, True]])
    for call in (
        lambda: gae(torch.zeros(1, 3), torch.zeros(1, 3), mask, gamma=1.0, lam=1.0),
        lambda: rewards_to_go(torch.zeros(1, 3), mask, 1.0),
    ):
        with pytest.raises(ValueError, match="'mask' must be right-padded"):
            call()


def test_whitening_is_that_of_the_tokens_laid_end_to_end():
    values = 3 * randn(5, 6) + 7
    tokens = np.concatenate([row[:length] for row, length in zip(values.numpy(), LENGTHS, strict=True)])
    expected = (tokens - np.mean(tokens)) / np.sqrt(np.var(tokens, ddof=1) + 1e-8)
    found = whiten(spoiled(values), MASK)
    torch.testing.assert_close(found.masked_select(MASK), torch.from_numpy(expected))
    assert found[~MASK].abs().max() == 0
    assert torch.var(found.masked_select(MASK)).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("constant", [0.1, -1234.5678, 1e-20, 0.0])
@pytest.mark.parametrize("lengths", [(6, 6, 1), (1,), (0, 3), (0,)])
def test_equal_values_and_a_single_one_are_at_the_mean_in_float32(constant, lengths):
    mask = length_mask(torch.tensor(lengths), 6)
    values = torch.full(mask.shape, constant)
    torch.testing.assert_close(whiten(values, mask), torch.zeros(mask.shape), rtol=0, atol=1e-6)


def test_spread_repeats_a_number_over_its_row():
    found = spread(torch.tensor([2.0, 3.0]), length_mask(torch.tensor([2, 0]), 3))
    assert found.tolist() == [[2, 2, 0], [0, 0, 0]]


# Advantages of responses.


def by_loops(scores, groups, rule):
    numbers, ids = scores.tolist(), groups.tolist()
    found = []
    for place, score in enumerate(numbers):
        others = [numbers[other] for other in range(len(ids)) if ids[other] == ids[place] and other != place]
        found.append(rule(score, others))
    return torch.tensor(found, dtype=scores.dtype)


RULES = {
    "rloo": (rloo, lambda score, others: score - np.mean(others)),
    "mean": (group_means, lambda score, others: np.mean([score, *others])),
    "grpo": (
        lambda scores, groups: grpo(scores, groups, scale=True),
        lambda score, others: (score - np.mean([score, *others])) / (np.std([score, *others], ddof=1) + 1e-6),
    ),
    "unscaled": (
        lambda scores, groups: grpo(scores, groups, scale=False),
        lambda score, others: score - np.mean([score, *others]),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_comparisons_within_groups_are_those_of_loops_over_groups_of_unequal_size(name):
    function, rule = RULES[name]
    torch.testing.assert_close(function(SCORES, GROUPS), by_loops(SCORES, GROUPS, rule))


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_responses_and_the_names_of_groups_do_not_matter(name):
    function, _ = RULES[name]
    expected = function(SCORES, GROUPS)
    renamed = torch.where(GROUPS == 70, -5, 10**12)
    torch.testing.assert_close(function(SCORES, renamed), expected)
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 17):
        order = torch.tensor(order)
        torch.testing.assert_close(function(SCORES[order], GROUPS[order]), expected[order])


def test_rloo_of_two_is_the_difference_either_way():
    torch.testing.assert_close(rloo(torch.tensor([5.0, 3.0]), torch.tensor([0, 0])), torch.tensor([2.0, -2.0]))


def test_rloo_is_the_centerd_score_times_n_over_n_less_one():
    for group, size in ((70, 3), (3, 2)):
        rows = group == GROUPS
        centered = grpo(SCORES, GROUPS, scale=False)[rows]
        torch.testing.assert_close(rloo(SCORES, GROUPS)[rows], centered * size / (size - 1))


@pytest.mark.parametrize("name", ["rloo", "grpo", "unscaled"])
def test_advantages_of_a_group_add_up_to_zero_and_do_not_see_an_offset(name):
    function, _ = RULES[name]
    found = function(SCORES, GROUPS)
    for group in (3, 70):
        assert found[group == GROUPS].sum().item() == pytest.approx(0, abs=1e-12)
    offset = torch.where(GROUPS == 70, 100.0, -40.0)
    torch.testing.assert_close(function(SCORES + offset, GROUPS), found)


def test_grpo_does_not_see_the_scale_of_a_group():
    torch.testing.assert_close(
        grpo(SCORES * 1000, GROUPS, scale=True), grpo(SCORES, GROUPS, scale=True), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("size", [3, 7, 64])
def test_groups_of_equal_scores_have_no_advantage_in_float32(size):
    scores = randn(50).float().repeat(size)
    for scale in (True, False):
        found = grpo(scores, torch.arange(50).repeat(size), scale=scale)
        torch.testing.assert_close(found, torch.zeros(50 * size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_group_of_one_is_refused_with_the_setting_to_change(name):
    with pytest.raises(ValueError, match=r"one response \(first of 1: 8\): .*rollout.samples must be at least 2"):
        RULES[name][0](torch.ones(3), torch.tensor([1, 8, 1]))


# The estimators by name.


def estimate(name, rewards, *, gamma=0.9, lam=0.8):
    values = spoiled(randn(5, 6, seed=9))
    return ESTIMATORS[name](rewards, values, MASK, GROUPS, gamma=gamma, lam=lam)


def test_the_table_says_what_each_estimator_needs():
    names = list(ESTIMATORS)
    assert names == ["gae", "rloo", "grpo", "grpo_unscaled", "reinforce_pp", "reinforce_pp_baseline"]
    assert [name for name in names if ESTIMATORS[name].needs_values] == ["gae"]
    assert [name for name in names if ESTIMATORS[name].needs_groups] == [
        *("rloo", "grpo", "grpo_unscaled", "reinforce_pp_baseline")
    ]
    assert [name for name in names if ESTIMATORS[name].whitened] == ["gae", "reinforce_pp", "reinforce_pp_baseline"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [("rloo", "rloo"), ("grpo", "grpo"), ("grpo_unscaled", "unscaled"), ("reinforce_pp_baseline", "unscaled")],
)
def test_estimators_of_responses_compare_sums_of_token_rewards_and_spread_them(name, rule):
    rewards = randn(5, 6)
    found = estimate(name, spoiled(rewards))
    sums = torch.tensor([row[:length].sum() for row, length in zip(rewards, LENGTHS, strict=True)], dtype=torch.float64)
    expected = by_loops(sums, GROUPS, RULES[rule][1])
    for row, length in enumerate(LENGTHS):
        assert found.advantages[row].tolist() == pytest.approx([expected[row].item()] * length + [0] * (6 - length))
    assert found.returns is None


def test_gae_and_reinforce_pp_by_name_are_their_functions():
    rewards, values = spoiled(randn(5, 6)), spoiled(randn(5, 6, seed=9))
    by_name = estimate("gae", rewards)
    for found, expected in zip(by_name, gae(rewards, values, MASK, gamma=0.9, lam=0.8), strict=True):
        torch.testing.assert_close(found, expected)
    found = ESTIMATORS["reinforce_pp"](rewards, None, MASK, None, gamma=0.9, lam=0.8)
    torch.testing.assert_close(found.advantages, rewards_to_go(rewards, MASK, 0.9))
    assert found.returns is None


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_are_constants_and_zero_outside_the_response(name):
    values = randn(5, 6).requires_grad_()
    found = ESTIMATORS[name](spoiled(randn(5, 6)), values, MASK, GROUPS)
    for tensor in found:
        if tensor is not None:
            assert not tensor.requires_grad
            assert tensor[~MASK].abs().max() == 0
            assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_asks_for_what_it_needs(name):
    row = ESTIMATORS[name]
    if row.needs_values:
        with pytest.raises(ValueError, match="needs the values of a critic"):
            row(randn(5, 6), None, MASK, GROUPS)
    if row.needs_groups:
        with pytest.raises(ValueError, match="needs the groups"):
            row(randn(5, 6), None, MASK, None)
    with pytest.raises(ValueError, match="shapes differ"):
        row(randn(5, 6), randn(5, 1), MASK, GROUPS)


FIVE, SIX, COLUMN = torch.zeros(5), torch.zeros(6), torch.zeros(5, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: missing_end_penalty(FIVE, torch.ones(5, 1, dtype=torch.bool), 1.0),
        lambda: token_rewards(SIX, None, MASK, 0.1),
        lambda: token_rewards(FIVE, COLUMN, MASK, 0.1),
        lambda: gae(randn(5, 6), COLUMN, MASK, gamma=1.0, lam=1.0),
        lambda: rewards_to_go(COLUMN, MASK, 1.0),
        lambda: spread(SIX, MASK),
        lambda: whiten(COLUMN, MASK),
        lambda: group_means(SIX, GROUPS),
        lambda: rloo(SIX, GROUPS),
        lambda: grpo(COLUMN, GROUPS, scale=True),
    ],
)
def test_shapes_that_differ_are_refused_not_broadcast(call):
    with pytest.raises(ValueError, match="shapes differ"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_scores(FIVE, 0.0), "limit must be greater than 0"),
        (lambda: missing_end_penalty(FIVE, FIVE, 1.0), "'ended' must be bool"),
        (lambda: missing_end_penalty(FIVE, FIVE.bool(), -1.0), "penalty must be in"),
        (lambda: length_penalty(FIVE, free_tokens=9, max_tokens=9, penalty=1.0), r"free_tokens must be in \[0, 9\)"),
        (lambda: length_penalty(FIVE, free_tokens=0, max_tokens=9, penalty=math.nan), "penalty must be in"),
        (lambda: gae(randn(5, 6), randn(5, 6), MASK, gamma=1.1, lam=1.0), r"gamma must be in \[0, 1\]"),
        (lambda: gae(randn(5, 6), randn(5, 6), MASK, gamma=1.0, lam=-0.1), r"lam must be in \[0, 1\]"),
        (lambda: rewards_to_go(randn(5, 6), MASK, math.nan), r"gamma must be in \[0, 1\]"),
        (lambda: whiten(randn(5, 6), MASK.long()), "'mask' must be a .* bool mask"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
