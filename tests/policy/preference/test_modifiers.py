import math

import pytest
import torch

from policy.preference.losses import DIVERGENCE_LOSSES, LOSSES
from policy.preference.modifiers import divergence_scores, length_desensitized, wpo_weights

KINDS = ("reverse_kl", "forward_kl", "js", "alpha")


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# Ratios 1, 4 and 1/4.
@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        ("reverse_kl", (0, math.log(4), -math.log(4))),
        ("forward_kl", (0, 0.75, -3)),
        ("js", (0, math.log(1.6), math.log(0.4))),
        ("alpha", (0, 1, -2)),
    ],
)
def test_scores_by_hand(kind, scores):
    torch.testing.assert_close(divergence_scores(f64(0, math.log(4), -math.log(4)), kind), f64(*scores))


def test_alpha_leads_from_forward_to_reverse_kl():
    logratios = torch.linspace(-3, 3, 13, dtype=torch.float64)
    at = {alpha: divergence_scores(logratios, "alpha", alpha) for alpha in (0.0, 1 - 1e-9, 1.0)}
    torch.testing.assert_close(at[0.0], divergence_scores(logratios, "forward_kl"))
    torch.testing.assert_close(at[1 - 1e-9], logratios, atol=1e-8, rtol=0)
    torch.testing.assert_close(at[1.0], logratios)


@pytest.mark.parametrize("kind", KINDS)
def test_every_score_is_the_slope_of_a_convex_function_with_unit_curvature_at_one(kind):
    logratios = torch.linspace(-4, 4, 17, dtype=torch.float64, requires_grad=True)
    scores = divergence_scores(logratios, kind)
    (slopes,) = torch.autograd.grad(scores.sum(), logratios)
    assert bool((slopes > 0).all())
    assert scores[8].item() == 0
    assert slopes[8].item() == pytest.approx(0.5 if kind == "js" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", sorted(DIVERGENCE_LOSSES & {"sigmoid", "ipo", "exo_pair", "discopop", "robust"}))
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_ratios_give_finite_losses_and_gradients_in_float32(kind, loss, size):
    chosen = torch.tensor([size, size / 2], requires_grad=True)
    rejected = torch.tensor([-size, size], requires_grad=True)
    inputs = {"chosen_logratios": divergence_scores(chosen, kind)}
    inputs |= {"rejected_logratios": divergence_scores(rejected, kind)}
    lengths = {key: torch.ones(2) for key in LOSSES[loss].inputs if key.endswith("lengths")}
    losses = LOSSES[loss](**inputs, **lengths)
    losses.sum().backward()
    for tensor in (losses, chosen.grad, rejected.grad):
        assert bool(torch.isfinite(tensor).all())


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of 'reverse_kl', .*, not 'kl'"):
        divergence_scores(f64(0), "kl")


@pytest.mark.parametrize("name", sorted(DIVERGENCE_LOSSES - {"sft"}))
def test_losses_of_divergences_see_no_offset_common_to_both_scores(name):
    inputs = {key: f64(3, -2) for key in LOSSES[name].inputs}
    inputs["rejected_logratios"] = f64(1, 1)
    for key in ("chosen_lengths", "rejected_lengths"):
        if key in inputs:
            inputs[key] = f64(2, 2)
    moved = {key: value + 5 if key.endswith("logratios") else value for key, value in inputs.items()}
    torch.testing.assert_close(LOSSES[name](**moved), LOSSES[name](**inputs))


def test_wpo_weights_by_hand():
    # Chosen: 2 tokens, of probability 1/2 and 1/8 where sum p^2 is 1/2 and 1/8; rejected: one of 1/8 for 1/2.
    arguments = {
        "chosen_logprobs": f64(math.log(1 / 16)),
        "chosen_square_sums": f64(math.log(1 / 16)),
        "chosen_lengths": f64(2),
        "rejected_logprobs": f64(math.log(1 / 8)),
        "rejected_square_sums": f64(math.log(1 / 2)),
        "rejected_lengths": f64(1),
    }
    torch.testing.assert_close(wpo_weights(**arguments), f64(0.25))
    longer = arguments | {"rejected_lengths": f64(2)}
    torch.testing.assert_close(wpo_weights(**longer), f64(0.5))
    halved = arguments | {"chosen_square_sums": f64(math.log(1 / 4))}
    torch.testing.assert_close(wpo_weights(**halved), f64(0.125))


def test_wpo_weights_carry_no_gradient_and_refuse_unlike_shapes():
    columns = [-torch.rand(3, requires_grad=True) for _ in range(6)]
    assert not wpo_weights(*columns).requires_grad
    with pytest.raises(ValueError, match=r"'rejected_lengths': \(3, 1\)"):
        wpo_weights(*columns[:5], torch.ones(3, 1))


def test_the_tail_counts_by_alpha():
    head, tail = f64(-4, -6), f64(-10, 0)
    assert length_desensitized(head, tail, 0.3).tolist() == [-7, -6]
    assert length_desensitized(head, tail, 0.0).tolist() == [-4, -6]
    assert length_desensitized(head, tail, 1.0).tolist() == [-14, -6]
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"alpha must be in .*not {alpha}"):
            length_desensitized(head, tail, alpha)
    with pytest.raises(ValueError, match=r"'tail': \(2, 1\)"):
        length_desensitized(head, tail[:, None], 0.5)
