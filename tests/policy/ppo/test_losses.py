import math

import pytest
import torch

from policy.ppo.losses import (
    IMPORTANCE_LEVELS,
    KL_KINDS,
    MAX_LOG_RATIO,
    NORMALIZATIONS,
    bounded_tokens,
    clipped_share,
    clipped_surrogate,
    clipped_value_loss,
    kl_estimates,
    reduce_tokens,
    sequence_ratios,
    token_ratios,
    truncated_importance,
    weighted_likelihood,
)
from rlhf.core.masking import length_mask

LENGTHS = (5, 1, 0, 3)
MASK = length_mask(torch.tensor(LENGTHS), 5)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def categorical(seed):
    return randn(6, seed=seed).log_softmax(0)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_estimates_by_hand(kind):
    found = kl_estimates(torch.tensor([[math.log(0.5), -1.0]]), torch.tensor([[math.log(0.25), -1.0]]), kind)
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}
    torch.testing.assert_close(found, torch.tensor([[expected[kind], 0.0]]))


def test_samples_average_to_the_kl_of_two_categorical_distributions():
    policy, reference = categorical(0), categorical(1)
    exact = (policy.exp() * (policy - reference)).sum()
    draws = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(2))
    sampled = policy[draws][None], reference[draws][None]
    for kind in ("k1", "k3"):
        estimates = kl_estimates(*sampled, kind)
        error = estimates.std() / math.sqrt(200_000)
        assert abs(estimates.mean() - exact) < 4 * error
        assert 4 * error < 0.03 * exact


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_in_either_precision(kind):
    for dtype in (torch.float32, torch.float64):
        logratios = torch.cat([torch.logspace(-3, 2, 200, dtype=dtype) * sign for sign in (1, -1)])[None]
        estimates = kl_estimates(logratios, torch.zeros_like(logratios), kind)
        assert bool((estimates > 0).all())
        assert bool(torch.isfinite(estimates).all())


def test_expected_gradients_are_zero_for_k1_and_those_of_reverse_and_forward_kl_for_k2_and_k3():
    logits, reference = randn(6, seed=3).requires_grad_(), categorical(4)
    policy = logits.log_softmax(0)
    chances = policy.exp()
    reverse = (chances * (policy - reference)).sum()
    forward = (reference.exp() * (reference - policy)).sum()
    expected = {"k1": None, "k2": reverse, "k3": forward}
    for kind, divergence in expected.items():
        mean = (chances.detach() * kl_estimates(policy[None], reference[None], kind)).sum()
        (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
        gradient = torch.zeros_like(found)
        if divergence is not None:
            (gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)
        torch.testing.assert_close(found, gradient)


def test_token_ratios_are_quotients_of_probabilities():
    new, old = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(token_ratios(new.log(), old.log()), new / old)


def test_sequence_ratios_and_their_gradients_are_those_of_the_geometric_mean():
    new, old = randn(4, 5).requires_grad_(), randn(4, 5, seed=1)
    upstream = randn(4, 5, seed=2)
    found = sequence_ratios(new, old, MASK)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), new)
    for row, length in enumerate(LENGTHS):
        twin = new[row, :length].detach().clone().requires_grad_()
        ratio = torch.ones((), dtype=torch.float64)
        for place in range(length):
            ratio = ratio * ((twin[place] - old[row, place]).exp() ** (1 / length))
        expected = torch.cat([ratio.expand(length), torch.zeros(5 - length, dtype=torch.float64)])
        torch.testing.assert_close(found[row], expected)
        if length:
            (own,) = torch.autograd.grad((expected * upstream[row]).sum(), twin)
            torch.testing.assert_close(gradient[row, :length], own)
    assert gradient[~MASK].abs().max() == 0


def test_what_stands_outside_the_response_has_no_part_in_sequence_ratios():
    new, old = randn(4, 5), randn(4, 5, seed=1)
    garbage = torch.where(MASK, new, 1e6)
    torch.testing.assert_close(sequence_ratios(garbage, old, MASK), sequence_ratios(new, old, MASK), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e3, -1e3])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_extreme_log_ratios_give_finite_losses_and_gradients_in_float32(size, advantage):
    logprobs = torch.full((2, 3), size, requires_grad=True)
    old, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for ratios in (token_ratios(logprobs, old), sequence_ratios(logprobs, old, mask)):
        torch.testing.assert_close(ratios[0, 0].item(), math.exp(math.copysign(MAX_LOG_RATIO, size)), rtol=1e-5, atol=0)
        losses = clipped_surrogate(ratios, torch.full((2, 3), advantage), clip_low=0.2, clip_high=0.2)
        losses = losses + kl_estimates(logprobs, old, "k3")
        (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
        assert bool(torch.isfinite(losses).all())
        assert bool(torch.isfinite(gradient).all())


def surrogate(ratio, advantage, low, high, dual):
    """The surrogate of the papers for one token; the objective turned into a loss."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, bounded * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


RATIOS = (0.0, 0.3, 0.79, 0.81, 1.0, 1.1, 1.27, 1.29, 2.9, 3.1, 50.0)
GRID = [(ratio, advantage) for ratio in RATIOS for advantage in (-2, 0, 3)]


@pytest.mark.parametrize("bounds", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 4.0)])
@pytest.mark.parametrize("dual", [None, 1.5, 3.0])
def test_the_surrogate_is_that_of_single_tokens_on_a_grid(bounds, dual):
    low, high = bounds
    ratios, advantages = torch.tensor(GRID, dtype=torch.float64).T[:, None]
    found = clipped_surrogate(ratios, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    expected = [[surrogate(ratio, advantage, low, high, dual) for ratio, advantage in GRID]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_cispo_bounds_the_weight_of_a_token_and_goes_on_learning_it():
    """The gradient of every token is that of its likelihood, weighted by advantage and clipped ratio."""
    logprobs = torch.tensor([[-1.0, -0.2, -3.0, -0.5]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.5, -2.2, -1.0, -0.5]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -2.0, 3.0, -4.0]], dtype=torch.float64)
    ratios = token_ratios(logprobs, old)
    weighted_likelihood(logprobs, ratios, advantages, clip_low=0.5, clip_high=1.0).sum().backward()
    expected = [-1.0 * math.exp(0.5), 2.0 * 2.0, -3.0 * 0.5, 4.0 * 1.0]
    assert logprobs.grad[0].tolist() == pytest.approx(expected)
    unbounded = weighted_likelihood(logprobs, ratios, advantages, clip_low=1.0, clip_high=1.0)
    assert unbounded[0, 2].item() == pytest.approx(-math.exp(-2.0) * 3.0 * -3.0), "from 1 on there is no lower bound"


def test_a_dual_clip_bounds_the_loss_of_bad_tokens_alone():
    ratios, advantages = torch.rand(2, 1, 500, generator=torch.Generator().manual_seed(0)) * 10
    advantages = advantages - 5
    plain = clipped_surrogate(ratios, advantages, clip_low=0.2, clip_high=0.2)
    dual = clipped_surrogate(ratios, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    bad = advantages < 0
    torch.testing.assert_close(dual[~bad], plain[~bad], rtol=0, atol=0)
    assert bool((dual[bad] <= 3 * advantages[bad].abs()).all())
    assert bool((plain[bad] > 3 * advantages[bad].abs()).any())
    torch.testing.assert_close(dual[bad], torch.minimum(plain[bad], 3 * advantages[bad].abs()))


def test_inside_the_bounds_the_gradient_is_that_of_the_policy_gradient():
    logprobs, advantages = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    ratios = token_ratios(logprobs, logprobs.detach())
    losses = clipped_surrogate(ratios, advantages.requires_grad_(), clip_low=0.2, clip_high=0.2, dual_clip=2.0)
    losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages.detach())
    assert advantages.grad is None


def test_the_clipped_tokens_are_those_without_a_gradient():
    ratios = (0.5 + torch.rand(4, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    advantages = randn(4, 5).float()
    losses = clipped_surrogate(ratios, advantages, clip_low=0.1, clip_high=0.3)
    (gradient,) = torch.autograd.grad(losses.sum(), ratios)
    clipped, tokens = clipped_share(ratios, advantages, MASK, clip_low=0.1, clip_high=0.3)
    assert clipped.item() == ((gradient == 0) & MASK).sum().item()
    assert 0 < clipped.item() < tokens.item() == sum(LENGTHS)


def test_the_clipped_share_sees_the_response_only_and_which_way_the_ratio_should_go():
    ratios = torch.tensor([[2.0, 2.0, 0.5, 0.5, 1.0, 9.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[True] * 5 + [False]])
    assert [int(n) for n in clipped_share(ratios, advantages, mask, clip_low=0.2, clip_high=0.2)] == [2, 5]


def test_cispo_bounds_weights_whichever_way_the_ratio_should_go():
    ratios, mask = torch.tensor([[2.0, 6.0, 0.5, 0.01, 9.0]]), torch.tensor([[True] * 4 + [False]])
    assert int(bounded_tokens(ratios, mask, clip_low=0.2, clip_high=4.0)) == 3
    assert int(bounded_tokens(ratios, mask, clip_low=1.0, clip_high=4.0)) == 1, "no lower bound"


def test_value_losses_are_those_of_single_tokens_on_a_grid():
    grid = [(v, old, r) for v in (-2.0, 0.05, 0.3, 4.0) for old in (0.0, 0.2, 1.0) for r in (-1.0, 0.1, 3.0)]
    values, old, returns = torch.tensor(grid, dtype=torch.float64).T[:, None]
    for clip in (None, 0.2, 1.0):
        expected = []
        for v, o, r in grid:
            near = v if clip is None else min(max(v, o - clip), o + clip)
            expected.append(max(0.5 * (v - r) ** 2, 0.5 * (near - r) ** 2))
        found = clipped_value_loss(values, old, returns, clip=clip)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_a_value_that_has_moved_past_the_bound_towards_its_target_has_no_gradient():
    values = torch.tensor([[0.5, 0.1, -0.5]], requires_grad=True)
    clipped_value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), clip=0.2).sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9, -1.5]]))


def test_reductions_by_hand():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = length_mask(torch.tensor([3, 1, 0]), 3)
    counts = {"tokens": 4, "sequences": 2, "max_tokens": 5}
    found = {kind: reduce_tokens(losses, mask, normalize=kind, **counts).item() for kind in NORMALIZATIONS}
    assert found == {"token": 10 / 4, "sequence": (2 + 4) / 2, "constant": 1.0}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_micro_batches_sum_to_the_whole_in_value_and_gradient(normalize):
    losses = randn(4, 5).requires_grad_()
    counts = {"normalize": normalize, "tokens": sum(LENGTHS), "sequences": 3, "max_tokens": 5}
    whole = reduce_tokens(losses, MASK, **counts)
    (expected,) = torch.autograd.grad(whole, losses)
    parts = [reduce_tokens(losses[rows], MASK[rows], **counts) for rows in ([3], [0, 2], [1])]
    torch.testing.assert_close(sum(parts), whole)
    (found,) = torch.autograd.grad(sum(parts), losses)
    torch.testing.assert_close(found, expected)
    assert expected[~MASK].abs().max() == 0


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_loss_of_one_everywhere_is_one_if_every_response_is_as_long_as_can_be(normalize):
    mask = torch.ones(4, 5, dtype=torch.bool)
    found = reduce_tokens(torch.ones(4, 5), mask, normalize=normalize, tokens=20, sequences=4, max_tokens=5)
    assert found.item() == pytest.approx(1)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_garbage_outside_the_response_and_batches_without_tokens_add_nothing(normalize):
    losses, counts = randn(4, 5), {"normalize": normalize, "tokens": 9, "sequences": 3, "max_tokens": 5}
    garbage = torch.where(MASK, losses, 1e30)
    torch.testing.assert_close(reduce_tokens(garbage, MASK, **counts), reduce_tokens(losses, MASK, **counts))
    assert reduce_tokens(losses.requires_grad_(), torch.zeros_like(MASK), **counts).item() == 0


def test_gspo_is_the_clipped_ratio_of_responses_times_their_advantage():
    new, old = randn(4, 5).mul(0.3).requires_grad_(), randn(4, 5, seed=1) * 0.3
    scores = torch.tensor([1.0, -2.0, 5.0, 0.5], dtype=torch.float64)
    losses = clipped_surrogate(
        sequence_ratios(new, old, MASK), scores[:, None].expand(4, 5), clip_low=0.05, clip_high=0.1
    )
    found = reduce_tokens(losses, MASK, normalize="sequence", tokens=9, sequences=3, max_tokens=5)
    expected = 0
    for row in (0, 1, 3):
        ratio = (new[row] - old[row])[: LENGTHS[row]].mean().exp()
        expected = expected - torch.minimum(ratio * scores[row], ratio.clamp(0.95, 1.1) * scores[row]) / 3
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, new), torch.autograd.grad(expected, new))


WIDE, FLAT = torch.zeros(4, 5), torch.zeros(4, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: kl_estimates(WIDE, FLAT, "k1"),
        lambda: token_ratios(WIDE, FLAT),
        lambda: sequence_ratios(WIDE, FLAT, MASK),
        lambda: sequence_ratios(FLAT, FLAT, MASK),
        lambda: clipped_surrogate(WIDE, FLAT, clip_low=0.2, clip_high=0.2),
        lambda: clipped_share(WIDE, FLAT, MASK, clip_low=0.2, clip_high=0.2),
        lambda: clipped_value_loss(WIDE, WIDE, FLAT, clip=None),
        lambda: clipped_value_loss(WIDE, FLAT, WIDE, clip=0.2),
        lambda: reduce_tokens(FLAT, MASK, normalize="token", tokens=1, sequences=1, max_tokens=1),
    ],
)
def test_shapes_that_differ_are_refused_not_broadcast(call):
    with pytest.raises(ValueError, match=r"shapes differ: .*\(4, 1\)"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_estimates(WIDE, WIDE, "k4"), "kind must be one of k1, k2, k3, not 'k4'"),
        (lambda: sequence_ratios(WIDE, WIDE, MASK.long()), "'mask' must be a .* bool mask"),
        (lambda: clipped_surrogate(WIDE, WIDE, clip_low=-0.1, clip_high=0.2), "clip_low must be in"),
        (lambda: clipped_surrogate(WIDE, WIDE, clip_low=0.1, clip_high=math.nan), "clip_high must be in"),
        (lambda: clipped_surrogate(WIDE, WIDE, clip_low=0.1, clip_high=0.1, dual_clip=1.0), "dual_clip must be gr"),
        (lambda: clipped_share(WIDE, WIDE, MASK, clip_low=0.1, clip_high=-1), "clip_high must be in"),
        (lambda: clipped_value_loss(WIDE, WIDE, WIDE, clip=0.0), "clip must be greater than 0"),
        (
            lambda: reduce_tokens(WIDE, MASK, normalize="mean", tokens=1, sequences=1, max_tokens=1),
            "normalize must be one of token, sequence, constant, not 'mean'",
        ),
        (
            lambda: reduce_tokens(WIDE, MASK, normalize="token", tokens=0, sequences=1, max_tokens=1),
            "tokens must be greater than 0",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- truncated importance sampling


def test_weighted_samples_of_another_distribution_have_the_mean_of_the_trained_one():
    trained, sampler, values = categorical(1), categorical(2), randn(6, seed=3)
    every = torch.ones(6, 1, dtype=torch.bool)
    weights = truncated_importance(trained[:, None], sampler[:, None], every, level="token", cap=1e9)[:, 0]
    torch.testing.assert_close((sampler.exp() * weights * values).sum(), (trained.exp() * values).sum())


def test_weights_by_hand():
    trained = torch.log(torch.tensor([[0.5, 0.9, 0.3], [0.2, 0.4, 1.0]]))
    sampler = torch.log(torch.tensor([[0.25, 0.6, 0.9], [0.4, 0.1, 1.0]]))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    by_token = truncated_importance(trained, sampler, mask, level="token", cap=1.8)
    torch.testing.assert_close(by_token, torch.tensor([[1.8, 1.5, 1 / 3], [0.5, 1.8, 0.0]]))
    whole = truncated_importance(trained, sampler, mask, level="sequence", cap=1.8)
    torch.testing.assert_close(whole, torch.tensor([[1.0, 1.0, 1.0], [1.8, 1.8, 0.0]]))


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_a_sampler_that_agrees_leaves_all_weights_at_one(level):
    logprobs = randn(4, 5).float()
    weights = truncated_importance(logprobs, logprobs.clone(), MASK, level=level, cap=2.0)
    torch.testing.assert_close(weights, MASK.float())


def test_weights_need_a_level_a_bound_and_one_shape():
    logprobs = torch.zeros(4, 5)
    with pytest.raises(ValueError, match="level must be one of token, sequence"):
        truncated_importance(logprobs, logprobs, MASK, level="none", cap=2.0)
    with pytest.raises(ValueError, match="cap"):
        truncated_importance(logprobs, logprobs, MASK, level="token", cap=0.0)
    with pytest.raises(ValueError, match="sampler_logprobs"):
        truncated_importance(logprobs, logprobs[:, :1], MASK, level="token", cap=2.0)
