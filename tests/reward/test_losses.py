import math

import pytest
import torch
import torch.nn.functional as F

from reward.losses import (
    STATISTICS,
    bradley_terry_loss,
    bsr_loss,
    centering_loss,
    focal_loss,
    forward_robust_loss,
    generalized_cross_entropy_loss,
    grm_dpo_loss,
    grm_sft_loss,
    hinge_loss,
    label_smoothing_loss,
    moving_average,
    norm_bt_loss,
    pos_reg_loss,
    robust_loss,
)
from reward.tables import LOSSES
from rlhf.core.table import parameter_values

TAKING_MARGINS = sorted(kind for kind, loss in LOSSES.items() if loss.takes_margins)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(kind, pairs, seed=9):
    """Per-pair inputs that the loss takes beside rewards: positive distances, negative log-probabilities."""
    values = randn(len(LOSSES[kind].inputs), pairs, seed=seed).abs() + 0.1
    return {
        name: value if name == "distances" else -value
        for name, value in zip(LOSSES[kind].inputs, values, strict=True)
    }


def value(loss, *rewards, **options):
    """The loss of one pair, as a float."""
    return loss(*(torch.tensor([reward], dtype=torch.float64) for reward in rewards), **options).item()


def one(number):
    return torch.tensor([number], dtype=torch.float64)


# Values by hand: log(1 + e) = 1.31326169, log(1 + 1/e) = .31326169, log 2 = .69314718.


def test_bradley_terry_by_hand():
    assert value(bradley_terry_loss, 1.5, 0.5) == pytest.approx(0.31326169)
    assert value(bradley_terry_loss, 0.5, 1.5) == pytest.approx(1.31326169)
    assert value(bradley_terry_loss, 3.0, 1.0, 2.0) == pytest.approx(0.69314718)


def test_label_smoothing_by_hand():
    assert value(label_smoothing_loss, 1.0, 0.0) == pytest.approx(0.9 * 0.31326169 + 0.1 * 1.31326169)
    assert value(label_smoothing_loss, 3.0, 0.0, 2.0, smoothing=0.2) == pytest.approx(0.51326169)


def test_generalized_cross_entropy_by_hand():
    assert value(generalized_cross_entropy_loss, math.log(3), 0.0, q=1.0) == pytest.approx(1 / 4)
    assert value(generalized_cross_entropy_loss, math.log(3), 0.0, q=0.5) == pytest.approx(2 * (1 - math.sqrt(0.75)))
    assert value(generalized_cross_entropy_loss, 2.0, 0.0, 2.0) == pytest.approx((1 - 0.5**0.7) / 0.7)


def test_robust_losses_by_hand():
    assert value(robust_loss, 1.0, 0.0) == pytest.approx((0.9 * 0.31326169 - 0.1 * 1.31326169) / 0.8)
    assert value(forward_robust_loss, math.log(3), 0.0, wrong_share=0.2) == pytest.approx(-math.log(0.8 * 0.75 + 0.05))


def robust_by_hand(gap, margin, share):
    """Both corrections in another way: by probabilities, one pair at a time."""
    right, wrong = 1 / (1 + math.exp(margin - gap)), 1 / (1 + math.exp(margin + gap))
    backward = (share * math.log(wrong) - (1 - share) * math.log(right)) / (1 - 2 * share)
    return backward, -math.log((1 - share) * right + share * wrong)


@pytest.mark.parametrize("q", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.45])
def test_losses_for_wrong_labels_are_those_of_another_implementation(q, share):
    chosen, rejected, margins = 3 * randn(3, 40, seed=7)
    gaps, handicaps = (chosen - rejected).tolist(), margins.tolist()
    expected = [robust_by_hand(*pair, share) for pair in zip(gaps, handicaps, strict=True)]
    backward = robust_loss(chosen, rejected, margins, wrong_share=share)
    forward = forward_robust_loss(chosen, rejected, margins, wrong_share=share)
    torch.testing.assert_close(torch.stack([backward, forward], 1), torch.tensor(expected, dtype=torch.float64))
    fading = generalized_cross_entropy_loss(chosen, rejected, margins, q=q)
    by_powers = [(1 - (1 / (1 + math.exp(m - d))) ** q) / q for d, m in zip(gaps, handicaps, strict=True)]
    torch.testing.assert_close(fading, torch.tensor(by_powers, dtype=torch.float64))


def test_backward_correction_has_in_the_mean_over_wrong_labels_the_loss_of_right_ones():
    chosen, rejected, margins = randn(3, 6)
    share = 0.3
    as_given = robust_loss(chosen, rejected, margins, wrong_share=share)
    swapped = robust_loss(rejected, chosen, margins, wrong_share=share)
    mean = (1 - share) * as_given + share * swapped
    torch.testing.assert_close(mean, bradley_terry_loss(chosen, rejected, margins))


def test_the_gradient_of_generalized_cross_entropy_is_that_of_bradley_terry_times_a_power_of_p():
    chosen, rejected = randn(2, 6).requires_grad_()
    (fading,) = torch.autograd.grad(generalized_cross_entropy_loss(chosen, rejected, q=0.6).sum(), chosen)
    (plain,) = torch.autograd.grad(bradley_terry_loss(chosen, rejected).sum(), chosen)
    torch.testing.assert_close(fading, plain * torch.sigmoid(chosen - rejected).detach() ** 0.6)


@pytest.mark.parametrize("kind", ["robust", "forward_robust"])
def test_without_wrong_labels_a_corrected_loss_is_bradley_terry(kind):
    chosen, rejected, margins = randn(3, 6)
    found = LOSSES[kind](chosen, rejected, margins, wrong_share=0.0)
    torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected, margins))


def test_hinge_by_hand():
    assert value(hinge_loss, 0.4, 0.1) == pytest.approx(0.7)
    assert value(hinge_loss, 0.4, 0.1, 0.5) == pytest.approx(1.2)
    assert value(hinge_loss, 0.4, 0.1, 0.5, width=0.0) == pytest.approx(0.2)
    assert value(hinge_loss, 3.0, 0.0, 1.9) == 0


def test_focal_by_hand():
    chosen = math.log(3)  # p = 3/4: half of the loss is left at gamma 1, a quarter at gamma 2
    assert value(focal_loss, chosen, 0.0, gamma=1.0) == pytest.approx(0.5 * math.log(4 / 3))
    assert value(focal_loss, chosen, 0.0) == pytest.approx(0.25 * math.log(4 / 3))
    assert value(focal_loss, 0.0, chosen) == pytest.approx(math.log(4))


def test_pos_reg_by_hand():
    assert value(pos_reg_loss, 1.0, 0.0) == pytest.approx(0.31326169 + 0.1 * 0.31326169)
    assert value(pos_reg_loss, 1.0, 0.0, mean_chosen=-1.0) == pytest.approx(0.31326169 + 0.1 * 1.31326169)


def test_centering_by_hand():
    assert value(centering_loss, 2.0, 1.0) == pytest.approx(0.31326169 + 0.01 * 9)


def test_norm_bt_by_hand():
    far = value(norm_bt_loss, 1.0, 0.0, distances=one(4.0), mean_distance=2.0)
    assert far == pytest.approx(0.5 * 0.31326169)
    next_to_each_other = value(norm_bt_loss, 1.0, 0.0, distances=one(0.01), mean_distance=2.0)
    assert next_to_each_other == pytest.approx(10 * 0.31326169)


def test_bsr_by_hand():
    assert value(bsr_loss, 2.0, 1.0) == pytest.approx(0.31326169 + 0.001 * 1.5**2)
    loss = value(bsr_loss, 2.0, 1.0, mean_reward=-3.0, pairs=64, coefficient=0.01)
    assert loss == pytest.approx(0.31326169 + 0.01 * 64 * 9)


def test_grm_by_hand():
    sft = value(grm_sft_loss, 1.0, 0.0, chosen_logprobs=one(-10.0))
    assert sft == pytest.approx(0.99 * 0.31326169 + 0.01 * 1.31326169)
    logprobs = {"chosen_logprobs": one(-20.0), "rejected_logprobs": one(-30.0)}
    dpo = value(grm_dpo_loss, 1.0, 0.0, **logprobs)
    assert dpo == pytest.approx(0.31326169)
    reference = {
        "reference_chosen_logprobs": one(-5.0),
        "reference_rejected_logprobs": one(-25.0),
    }
    dpo = value(grm_dpo_loss, 1.0, 0.0, **logprobs, **reference, weight=0.5)
    assert dpo == pytest.approx(0.5 * 0.31326169 + 0.5 * 1.31326169)


def test_a_margin_acts_as_a_handicap_on_chosen():
    chosen, rejected, margins = randn(3, 5)
    for loss in (bradley_terry_loss, label_smoothing_loss, hinge_loss):
        with_margin = loss(chosen, rejected, margins)
        torch.testing.assert_close(with_margin, loss(chosen - margins, rejected))


def test_a_column_of_margins_is_refused_not_broadcast():
    with pytest.raises(ValueError, match=r"'margins': \(3, 1\)"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_every_loss_is_unreduced_and_refuses_unlike_shapes(kind):
    chosen, rejected = randn(2, 5)
    assert LOSSES[kind](chosen, rejected, **inputs_of(kind, 5)).shape == (5,)
    for wrong in (rejected[:, None], rejected[:4]):
        with pytest.raises(ValueError, match=r"shapes differ: 'chosen': .*'rejected'"):
            LOSSES[kind](chosen, wrong, **inputs_of(kind, 5))
    for name in LOSSES[kind].inputs:
        with pytest.raises(ValueError, match=rf"'{name}': \(5, 1\)"):
            LOSSES[kind](chosen, rejected, **inputs_of(kind, 5) | {name: torch.ones(5, 1)})


@pytest.mark.parametrize("kind", TAKING_MARGINS)
def test_every_loss_that_takes_margins_uses_them(kind):
    chosen, rejected, margins = randn(3, 6).abs()
    inputs = inputs_of(kind, 6)
    without = LOSSES[kind](chosen, rejected, **inputs)
    torch.testing.assert_close(LOSSES[kind](chosen, rejected, torch.zeros(6), **inputs), without)
    more_wanted = LOSSES[kind](chosen - 3, rejected, margins, **inputs)
    assert bool((more_wanted > LOSSES[kind](chosen - 3, rejected, **inputs)).all())


def test_margins_are_refused_where_the_formula_has_no_place_for_them():
    assert LOSSES.keys() - TAKING_MARGINS == {"focal"}
    with pytest.raises(ValueError, match="focal_loss has no place for margins"):
        LOSSES["focal"](torch.zeros(2), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_autograd_agrees_with_finite_differences(kind):
    chosen, rejected, margins = (tensor.requires_grad_() for tensor in randn(3, 4, seed=3))
    inputs = inputs_of(kind, 4)
    if not LOSSES[kind].takes_margins:
        margins = None

    def mean_loss(chosen, rejected, margins):
        return LOSSES[kind](chosen, rejected, margins, **inputs).mean()

    assert torch.autograd.gradcheck(mean_loss, (chosen, rejected, margins))


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("gap", [1e4, -1e4, 0.0])
def test_extreme_gaps_give_finite_losses_and_gradients(kind, gap):
    chosen = torch.full((3,), gap / 2, requires_grad=True)
    rejected = torch.full((3,), -gap / 2, requires_grad=True)
    inputs = {name: tensor.float() for name, tensor in inputs_of(kind, 3).items()}
    losses = LOSSES[kind](chosen, rejected, **inputs)
    losses.sum().backward()
    for tensor in (losses, chosen.grad, rejected.grad):
        assert bool(torch.isfinite(tensor).all())


def pos_reg_of_a_batch(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean() - 0.1 * F.logsigmoid(chosen.mean())


def bsr_of_a_batch(chosen, rejected):
    everything = torch.cat([chosen, rejected])
    return -F.logsigmoid(chosen - rejected).mean() + 0.001 * len(chosen) * everything.mean() ** 2


def norm_bt_of_a_batch(chosen, rejected):
    distances = inputs_of("norm_bt", len(chosen))["distances"]
    return -(distances.mean() / distances * F.logsigmoid(chosen - rejected)).mean()


BATCH_FORMULAS = {"pos_reg": pos_reg_of_a_batch, "bsr": bsr_of_a_batch, "norm_bt": norm_bt_of_a_batch}


@pytest.mark.parametrize("kind", sorted(BATCH_FORMULAS))
@pytest.mark.parametrize("sizes", [[8], [3, 1, 4], [1] * 8])
def test_value_and_gradient_are_those_of_the_batch_formula_however_the_batch_is_cut(kind, sizes):
    rewards, twins = (2 * randn(2, 8) + 1 for _ in range(2))
    rewards.requires_grad_()
    twins.requires_grad_()
    inputs = inputs_of(kind, 8)
    per_pair = (*rewards.detach(), inputs.get("distances"))
    statistics = {
        name: 8 if name == "pairs" else float(STATISTICS[name](*per_pair).mean())
        for name in LOSSES[kind].statistics
    }
    total = 0.0
    for part in torch.arange(8).split(sizes):
        chosen, rejected = rewards[:, part]
        part_inputs = {name: tensor[part] for name, tensor in inputs.items()}
        loss = LOSSES[kind](chosen, rejected, **part_inputs, **statistics).sum() / 8
        loss.backward()
        total += loss.item()
    expected = BATCH_FORMULAS[kind](*twins)
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(rewards.grad, twins.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", sorted(BATCH_FORMULAS))
def test_statistics_left_out_are_those_of_the_call(kind):
    rewards = randn(2, 8)
    loss = LOSSES[kind](*rewards, **inputs_of(kind, 8)).mean()
    torch.testing.assert_close(loss, BATCH_FORMULAS[kind](*rewards))


def test_statistics_pass_no_gradient_of_their_own():
    chosen, rejected = randn(2, 4).requires_grad_()
    mean = chosen.mean() * 3
    (gradient,) = torch.autograd.grad(pos_reg_loss(chosen, rejected, mean_chosen=mean).mean(), chosen)
    (expected,) = torch.autograd.grad(
        pos_reg_loss(chosen, rejected, mean_chosen=mean.item()).mean(), chosen
    )
    torch.testing.assert_close(gradient, expected)


def test_label_smoothing_is_cross_entropy_against_soft_labels():
    chosen, rejected = randn(2, 6)
    soft = torch.full((6,), 0.8, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(chosen - rejected, soft, reduction="none")
    torch.testing.assert_close(label_smoothing_loss(chosen, rejected, smoothing=0.2), expected)


def test_hinge_is_the_margin_ranking_loss_of_torch():
    chosen, rejected = randn(2, 6)
    expected = F.margin_ranking_loss(chosen, rejected, torch.ones(6), margin=0.5, reduction="none")
    torch.testing.assert_close(hinge_loss(chosen, rejected, width=0.5), expected)


def test_focal_is_bradley_terry_for_misranked_pairs_and_less_for_others():
    gap = torch.linspace(-4, 4, 9, dtype=torch.float64)
    focal, plain = focal_loss(gap, 0 * gap), bradley_terry_loss(gap, 0 * gap)
    torch.testing.assert_close(focal[:5], plain[:5])
    assert bool((focal[5:] < plain[5:]).all())
    torch.testing.assert_close(focal_loss(gap, 0 * gap, gamma=0.0), plain)


def test_focal_keeps_the_gradient_of_bradley_terry_at_a_tie():
    chosen = torch.zeros(1, requires_grad=True)
    focal_loss(chosen, torch.zeros(1)).sum().backward()
    assert chosen.grad.item() == -0.5


def test_norm_bt_makes_the_head_gradient_independent_of_distance():
    head = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    difference = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    norms = []
    for scale in (0.1, 1.0, 50.0):
        chosen = (scale * difference @ head)[None]
        distances = one(3 * scale)
        loss = norm_bt_loss(chosen, torch.zeros_like(chosen), distances=distances, mean_distance=0.7)
        norms.append(torch.autograd.grad(loss.sum(), head)[0].norm().item())
    assert norms == pytest.approx([0.35] * 3)


def test_norm_bt_caps_the_weight_of_coinciding_representations():
    zeros = torch.zeros(2)
    losses = norm_bt_loss(zeros, zeros, distances=torch.tensor([0.0, 1.0]), max_weight=5.0)
    torch.testing.assert_close(losses, math.log(2) * torch.tensor([5.0, 0.5]))
    assert bool(torch.isfinite(norm_bt_loss(zeros, zeros, distances=zeros)).all())


def test_norm_bt_passes_no_gradient_to_the_distances():
    distances = torch.ones(2, requires_grad=True)
    rewards = torch.ones(2, requires_grad=True)
    norm_bt_loss(rewards, torch.zeros(2), distances=distances).sum().backward()
    assert distances.grad is None


def test_grm_sends_its_second_gradient_through_the_logprobs():
    logprobs = torch.zeros(2, requires_grad=True)
    grm_sft_loss(torch.zeros(2), torch.zeros(2), chosen_logprobs=logprobs).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.full((2,), -0.01 * 0.1 * 0.5))


def test_grm_refuses_half_a_reference():
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="give both reference_chosen_logprobs and reference_rejected"):
        grm_dpo_loss(
            zeros, zeros, chosen_logprobs=zeros, rejected_logprobs=zeros, reference_chosen_logprobs=zeros
        )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("label_smoothing", {"smoothing": 0.5}, r"smoothing must be in \[0, 0.5\), not 0.5"),
        ("hinge", {"width": -1.0}, "width must be in"),
        ("focal", {"gamma": -1.0}, "gamma must be in"),
        ("pos_reg", {"weight": -0.1}, "weight must be in"),
        ("centering", {"coefficient": math.nan}, "coefficient must be in"),
        ("bsr", {"coefficient": -1.0}, "coefficient must be in"),
        ("norm_bt", {"max_weight": 0.0}, "max_weight must be greater than 0"),
        ("grm_sft", {"weight": 1.0}, r"weight must be in \[0, 1\), not 1.0"),
        ("grm_dpo", {"beta": 0.0}, "beta must be greater than 0"),
    ],
)
def test_parameters_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[kind](torch.zeros(2), torch.zeros(2), **inputs_of(kind, 2), **options)


def test_a_moving_average_starts_at_its_first_value():
    assert moving_average(None, 3.0) == 3.0
    assert moving_average(2.0, 3.0) == pytest.approx(2.1)
    assert moving_average(2.0, 3.0, decay=0.0) == 3.0
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), not 1.0"):
        moving_average(2.0, 3.0, decay=1.0)


def test_the_table_tells_what_each_loss_takes():
    statistics = {kind: loss.statistics for kind, loss in LOSSES.items() if loss.statistics}
    assert statistics == {
        "pos_reg": ("mean_chosen",),
        "norm_bt": ("mean_distance",),
        "bsr": ("mean_reward", "pairs"),
    }
    inputs = {kind: loss.inputs for kind, loss in LOSSES.items() if loss.inputs}
    assert inputs == {
        "norm_bt": ("distances",),
        "grm_sft": ("chosen_logprobs",),
        "grm_dpo": ("chosen_logprobs", "rejected_logprobs"),
    }
    defaults = {kind: parameter_values(LOSSES, kind, {}, noun="loss") for kind in LOSSES}
    assert {kind: values for kind, values in defaults.items() if values} == {
        "generalized_cross_entropy": {"q": 0.7},
        "robust": {"wrong_share": 0.1},
        "forward_robust": {"wrong_share": 0.1},
        "label_smoothing": {"smoothing": 0.1},
        "hinge": {"width": 1.0},
        "focal": {"gamma": 2.0},
        "pos_reg": {"weight": 0.1},
        "centering": {"coefficient": 0.01},
        "norm_bt": {"max_weight": 10.0},
        "bsr": {"coefficient": 0.001},
        "grm_sft": {"weight": 0.01, "beta": 0.1},
        "grm_dpo": {"weight": 0.01, "beta": 0.1},
    }
