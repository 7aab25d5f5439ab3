import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.losses import bradley_terry_loss
from reward.margins import optimal_transport_margins, reward_margins, similarity_margins

READINGS = ("row", "row_sum", "pair", "max")


def make_pairs(pairs, columns=None, features=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    columns = pairs if columns is None else columns
    return (
        torch.randn(pairs, features, generator=generator, dtype=dtype),
        torch.randn(columns, features, generator=generator, dtype=dtype),
        torch.randn(pairs, generator=generator, dtype=dtype),
        torch.randn(columns, generator=generator, dtype=dtype),
    )


def worked_pairs():
    return (
        torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.float64),
        torch.tensor([[1, 0.1, 0], [0, 0, 2], [-1, 1, 0]], dtype=torch.float64),
        torch.tensor([0.5, 2, -1], dtype=torch.float64),
        torch.tensor([0.4, -1, 1], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("reward_cost", "center_rewards", "margins", "mean_loss"),
    [
        ("abs", False, [0.22515003, 0.11961279, 0.16242418], 1.02786457),
        ("abs", True, [0.18955329, 0.11684529, 0.19468349], 1.03122425),
        ("signed", False, [0.33838556, 0.17551740, 0.69162791], 1.21142429),
        ("signed", True, [0.37533448, 0.20130703, 0.62539609], 1.19822470),
    ],
)
def test_margins_and_losses_are_those_worked_out_beforehand(reward_cost, center_rewards, margins, mean_loss):
    *embeddings, chosen, rejected = worked_pairs()
    found = optimal_transport_margins(
        *embeddings, chosen, rejected, reward_cost=reward_cost, center_rewards=center_rewards
    )
    expected = torch.tensor(margins, dtype=torch.float64)
    torch.testing.assert_close(found.margins, expected, rtol=0, atol=1e-7)
    loss = float(bradley_terry_loss(chosen, rejected, found.margins).mean())
    assert loss == pytest.approx(mean_loss, abs=1e-7)


def test_the_plain_loss_and_the_costs_of_the_pairs_are_those_worked_out_beforehand():
    *_, chosen, rejected = worked_pairs()
    assert float(bradley_terry_loss(chosen, rejected).mean()) == pytest.approx(0.93997067, abs=1e-7)
    cost = optimal_transport_margins(*worked_pairs(), center_rewards=False).cost
    expected = torch.tensor([0.52702245, 0.04268329, 0.10728263], dtype=torch.float64)
    torch.testing.assert_close(cost.diag(), expected, rtol=0, atol=1e-8)


def cost_by_loops(chosen_embeddings, rejected_embeddings, chosen, rejected, reward_cost):
    cost = np.zeros((len(chosen), len(rejected)))
    for i, (e, r) in enumerate(zip(chosen_embeddings, chosen, strict=True)):
        for j, (f, q) in enumerate(zip(rejected_embeddings, rejected, strict=True)):
            cosine = (e @ f) / math.sqrt((e @ e) * (f @ f))
            distance = abs(r - q) if reward_cost == "abs" else r - q
            cost[i, j] = 0.7 * (1 - 1 / (1 + math.exp(-distance))) + 0.3 * cosine
    return cost


@pytest.mark.parametrize("reward_cost", ["abs", "signed"])
@pytest.mark.parametrize(("pairs", "columns"), [(1, 1), (5, 5), (3, 8)])
def test_margins_are_those_of_loops_and_the_plain_sinkhorn_solver(pairs, columns, reward_cost):
    inputs = make_pairs(pairs, columns)
    a, b = (torch.arange(1.0, n + 1, dtype=torch.float64) for n in (pairs, columns))
    found = optimal_transport_margins(
        *inputs,
        reward_weight=0.7,
        semantic_weight=0.3,
        epsilon=0.2,
        max_iterations=500,
        reward_cost=reward_cost,
        center_rewards=False,
        chosen_weights=a,
        rejected_weights=b,
    )
    cost = cost_by_loops(*(tensor.numpy() for tensor in inputs), reward_cost)
    plan = ot.sinkhorn((a / a.sum()).numpy(), (b / b.sum()).numpy(), cost, 0.2, stopThr=1e-14, warn=False)
    expected = torch.from_numpy((plan * cost).sum(1) / plan.sum(1))
    torch.testing.assert_close(found.cost, torch.from_numpy(cost), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.margins, expected, rtol=0, atol=1e-10)
    assert float(found.transport_cost) == pytest.approx(float((plan * cost).sum()), abs=1e-10)


def test_margins_tend_to_the_cost_of_the_exact_assignment_as_epsilon_vanishes():
    errors = []
    for epsilon in (0.1, 0.01, 0.003):
        found = optimal_transport_margins(*make_pairs(6, seed=7), epsilon=epsilon, max_iterations=2000)
        uniform = np.full(6, 1 / 6)
        exact = 6 * torch.from_numpy(ot.emd(uniform, uniform, found.cost.numpy()))
        errors.append(float((found.margins - (exact * found.cost).sum(1)).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("reading", READINGS)
def test_a_single_pair_has_its_own_cost_as_margin(reading):
    found = optimal_transport_margins(*make_pairs(1), reading=reading)
    torch.testing.assert_close(found.margins, found.cost[0], rtol=0, atol=1e-15)
    assert found.converged


def test_an_untrained_model_gets_half_the_reward_weight_and_the_similarity():
    same_direction = torch.ones(4, 3)
    found = optimal_transport_margins(same_direction, 2 * same_direction, torch.zeros(4), torch.zeros(4))
    torch.testing.assert_close(found.margins, torch.full((4,), 0.9 * 0.5 + 0.1))
    torch.testing.assert_close(found.reward_terms, torch.full((4,), 0.45))
    torch.testing.assert_close(found.semantic_terms, torch.full((4,), 0.1))


def test_only_the_signed_cost_gives_misranked_pairs_more_margin_than_ties():
    chosen, rejected = torch.tensor([2.0, 0.0, -2.0]), torch.tensor([-2.0, 0.0, 2.0])
    well, tie, misranked = reward_margins(chosen, rejected, reward_cost="abs")
    assert well == misranked < tie
    well, tie, misranked = reward_margins(chosen, rejected, reward_cost="signed")
    assert well < tie < misranked


def test_a_large_gap_keeps_its_digits():
    margins = reward_margins(torch.tensor([30.0]), torch.tensor([0.0]), reward_weight=1.0)
    assert float(margins) == pytest.approx(math.exp(-30), rel=1e-5, abs=0)


@pytest.mark.parametrize("reward_cost", ["abs", "signed"])
@pytest.mark.parametrize("center_rewards", [True, False])
def test_reward_and_similarity_margins_add_up_to_the_pair_reading(reward_cost, center_rewards):
    inputs = make_pairs(4, 7)
    found = optimal_transport_margins(
        *inputs, reading="pair", reward_cost=reward_cost, center_rewards=center_rewards
    )
    similarity = similarity_margins(inputs[0], inputs[1][:4])
    reward = reward_margins(inputs[2], inputs[3][:4], reward_cost=reward_cost)
    torch.testing.assert_close(found.semantic_terms, similarity, rtol=0, atol=1e-15)
    torch.testing.assert_close(found.reward_terms, reward, rtol=0, atol=1e-15)
    torch.testing.assert_close(found.margins, found.cost.diag(), rtol=0, atol=1e-15)


def test_the_max_reading_is_the_cost_of_the_hardest_opponent_that_counts():
    inputs = make_pairs(4, 6)
    weights = torch.tensor([1, 1, 0, 1, 0, 1])
    found = optimal_transport_margins(*inputs, reading="max", rejected_weights=weights)
    torch.testing.assert_close(found.margins, found.cost[:, weights > 0].amax(1), rtol=0, atol=1e-15)


def test_an_opponent_that_does_not_count_is_not_the_hardest_even_where_all_others_are_easy():
    opposite = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rewards, weights = torch.tensor([30.0, 30.0]), torch.tensor([1.0, 0.0])
    found = optimal_transport_margins(
        opposite, -opposite, rewards, -rewards, reading="max", rejected_weights=weights
    )
    torch.testing.assert_close(found.margins, torch.tensor([-0.1, -0.1]))


def test_the_row_sum_reading_is_the_row_reading_times_the_row_weight():
    inputs, weights = make_pairs(3), torch.tensor([1.0, 2, 5], dtype=torch.float64)
    row = optimal_transport_margins(*inputs, chosen_weights=weights)
    row_sum = optimal_transport_margins(*inputs, chosen_weights=weights, reading="row_sum")
    torch.testing.assert_close(row_sum.margins, row.margins * weights / 8, rtol=0, atol=1e-14)


@pytest.mark.parametrize("reading", READINGS)
def test_terms_add_up_to_margins_and_margins_stay_in_the_range_of_the_cost(reading):
    found = optimal_transport_margins(*make_pairs(6, 9), reading=reading)
    torch.testing.assert_close(found.margins, found.reward_terms + found.semantic_terms)
    torch.testing.assert_close(found.transport_cost, (found.plan * found.cost).sum())
    if reading != "row_sum":
        assert bool((found.margins <= found.cost.amax(1) + 1e-12).all())
        assert bool((found.margins >= found.cost.amin(1) - 1e-12).all())


@pytest.mark.parametrize("reading", READINGS)
@given(pairs=st.integers(1, 7), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_permuted_pairs_have_permuted_margins(reading, pairs, seed):
    inputs = make_pairs(pairs, seed=seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    margins = optimal_transport_margins(*inputs, reading=reading).margins
    permuted = optimal_transport_margins(*(tensor[order] for tensor in inputs), reading=reading).margins
    torch.testing.assert_close(permuted, margins[order], rtol=0, atol=1e-12)


def test_a_batch_repeated_has_its_margins_repeated():
    inputs = make_pairs(4)
    margins = optimal_transport_margins(*inputs).margins
    repeated = optimal_transport_margins(*(torch.cat([tensor, tensor]) for tensor in inputs)).margins
    torch.testing.assert_close(repeated, torch.cat([margins, margins]), rtol=0, atol=1e-12)


def test_an_offset_per_prompt_moves_margins_only_without_centering():
    chosen_embeddings, rejected_embeddings, chosen, rejected = make_pairs(5)
    offsets = torch.tensor([3.0, -2, 0, 7, 1], dtype=torch.float64)

    def change(center_rewards):
        plain, moved = (
            optimal_transport_margins(
                chosen_embeddings,
                rejected_embeddings,
                chosen + by,
                rejected + by,
                center_rewards=center_rewards,
            ).margins
            for by in (0 * offsets, offsets)
        )
        return float((plain - moved).abs().max())

    assert change(center_rewards=True) < 1e-12
    assert change(center_rewards=False) > 0.05


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("center_rewards", [True, False])
def test_padding_pairs_may_hold_anything_and_change_nothing(reading, center_rewards):
    inputs = make_pairs(4)
    places = torch.tensor([0, 2, 3, 5])
    padded = [tensor.new_full((6, *tensor.shape[1:]), math.nan) for tensor in inputs]
    for wide, tensor in zip(padded, inputs, strict=True):
        wide[places] = tensor
    weights = torch.zeros(6)
    weights[places] = 1
    options = {"reading": reading, "center_rewards": center_rewards}
    found = optimal_transport_margins(*padded, **options, chosen_weights=weights, rejected_weights=weights)
    expected = optimal_transport_margins(*inputs, **options)
    torch.testing.assert_close(found.margins[places], expected.margins, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.transport_cost, expected.transport_cost, rtol=0, atol=1e-12)
    assert found.margins[[1, 4]].tolist() == [0, 0]
    assert bool(torch.isfinite(found.cost).all())


def test_a_pair_whose_partner_has_weight_zero_gets_no_pair_margin():
    weights = torch.tensor([1, 0, 1])
    found = optimal_transport_margins(*make_pairs(3), reading="pair", rejected_weights=weights)
    assert found.margins[1] == 0
    assert found.margins[0] == found.cost[0, 0]


def test_queued_columns_enter_as_the_call_before_returned_them():
    earlier, now = make_pairs(3, seed=1), make_pairs(4, seed=2)
    queued = optimal_transport_margins(*earlier).rejected_rewards
    found = optimal_transport_margins(
        now[0], torch.cat([now[1], earlier[1]]), now[2], torch.cat([now[3], queued])
    )
    centered = [rewards - (pair[2] + pair[3]) / 2 for pair in (earlier, now) for rewards in pair[2:]]
    expected = optimal_transport_margins(
        now[0],
        torch.cat([now[1], earlier[1]]),
        centered[2],
        torch.cat([centered[3], centered[1]]),
        center_rewards=False,
    )
    torch.testing.assert_close(found.margins, expected.margins, rtol=0, atol=1e-14)
    assert found.plan.shape == (4, 7)


def test_without_centering_rewards_are_queued_as_they_are():
    inputs = make_pairs(3)
    assert optimal_transport_margins(*inputs, center_rewards=False).rejected_rewards.equal(inputs[3])


@pytest.mark.parametrize("reading", READINGS)
def test_no_gradient_reaches_the_model(reading):
    inputs = [tensor.requires_grad_() for tensor in make_pairs(4)]
    found = optimal_transport_margins(*inputs, reading=reading)
    assert not any(value.requires_grad for value in vars(found).values() if isinstance(value, torch.Tensor))
    assert not similarity_margins(*inputs[:2]).requires_grad
    assert not reward_margins(*inputs[2:]).requires_grad


def test_half_precision_and_autocast_are_worked_in_single_precision():
    halves = [tensor.bfloat16() for tensor in make_pairs(8)]
    expected = optimal_transport_margins(*(tensor.float() for tensor in halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = optimal_transport_margins(*halves)
    assert found.margins.dtype == torch.float32
    torch.testing.assert_close(found.margins, expected.margins, rtol=0, atol=0)


@pytest.mark.parametrize("reading", READINGS)
def test_a_zero_embedding_has_cosine_zero(reading):
    inputs = make_pairs(3)
    inputs[0][1] = 0
    found = optimal_transport_margins(*inputs, reading=reading)
    assert found.semantic_terms[1] == 0
    assert bool(torch.isfinite(found.margins).all())
    assert similarity_margins(inputs[0], inputs[1])[1] == 0


@pytest.mark.parametrize("reward_cost", ["abs", "signed"])
def test_extreme_rewards_give_finite_margins(reward_cost):
    embeddings = torch.ones(3, 2)
    rewards = torch.tensor([3e4, -3e4, 0.0])
    found = optimal_transport_margins(embeddings, embeddings, rewards, -rewards, reward_cost=reward_cost)
    assert bool(torch.isfinite(found.margins).all())
    assert float(found.margins.max()) <= 1.0 + 1e-6


def test_an_unfinished_plan_is_reported_and_still_normalized_by_its_rows():
    found = optimal_transport_margins(*make_pairs(8), epsilon=0.001, max_iterations=3)
    assert not found.converged
    assert found.residual > 0.01
    assert bool((found.margins <= found.cost.amax(1) + 1e-12).all())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(4, 6), r"got 'chosen_embeddings': \(4, 6\), 'rejected_embeddings': \(4, 5\)"),
        (1, torch.zeros(3, 5), r"0 < B <= N; got .*'rejected_embeddings': \(3, 5\)"),
        (2, torch.zeros(4, 1), r"'chosen_rewards': \(4, 1\)"),
        (3, torch.zeros(5), r"'rejected_rewards': \(5,\)"),
        (2, torch.tensor([0, math.nan, 0, 0]), "'chosen_rewards' has 1 of 4 entries that are not finite"),
        (3, torch.tensor([0, 0, math.inf, 0]), "'rejected_rewards' has 1 of 4 entries that are not finite"),
        (1, torch.full((4, 5), math.nan), "'rejected_embeddings' has 20 of 20 entries that are not finite"),
    ],
)
def test_inputs_that_do_not_fit_or_are_not_finite_are_refused(place, value, message):
    inputs = list(make_pairs(4))
    inputs[place] = value
    with pytest.raises(ValueError, match=message):
        optimal_transport_margins(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_cost": "squared"}, "reward_cost must be 'abs' or 'signed', not 'squared'"),
        ({"reading": "column"}, "reading must be 'row', 'row_sum', 'pair' or 'max', not 'column'"),
        ({"epsilon": 0.0}, "epsilon must be greater than 0"),
        ({"chosen_weights": torch.zeros(4)}, "'chosen_weights' are all 0"),
        ({"rejected_weights": torch.ones(3)}, r"'rejected_weights' must have shape \(4,\), not \(3,\)"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optimal_transport_margins(*make_pairs(4), **options)


def test_a_partner_that_is_not_finite_is_refused_where_its_pair_is_centerd():
    inputs = make_pairs(3)
    inputs[3][1] = math.nan
    weights = torch.tensor([1, 0, 1])
    with pytest.raises(ValueError, match="'centered_chosen_rewards' has 1 of 3"):
        optimal_transport_margins(*inputs, rejected_weights=weights)
    margins = optimal_transport_margins(*inputs, rejected_weights=weights, center_rewards=False).margins
    assert bool(torch.isfinite(margins).all())


@pytest.mark.parametrize(("pairs", "columns"), [(4, 3), (0, 0), (0, 2)])
def test_fewer_columns_than_pairs_or_no_pairs_are_refused(pairs, columns):
    with pytest.raises(ValueError, match="0 < B <= N"):
        optimal_transport_margins(*make_pairs(pairs, columns))


def test_simple_margins_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"'rejected_rewards': \(3, 1\)"):
        reward_margins(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="'chosen_rewards' has 1 of 1"):
        reward_margins(torch.tensor([math.nan]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"'rejected_embeddings': \(2, 4\)"):
        similarity_margins(torch.zeros(3, 4), torch.zeros(2, 4))
