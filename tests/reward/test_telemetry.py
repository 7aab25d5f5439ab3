"""Margin telemetry, against values worked out by hand, numpy, and the margins module itself."""

import math

import numpy as np
import pytest
import torch

from reward.margins import optimal_transport_margins
from reward.telemetry import margin_telemetry

ALWAYS = {"margin/mean", "margin/p10", "margin/p50", "margin/p90", "margin/misranked_share"}


def pairs(count: int, *, width: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, count, width, generator=generator)
    chosen_rewards, rejected_rewards = torch.randn(2, count, generator=generator)
    return {
        "chosen_embeddings": chosen,
        "rejected_embeddings": rejected,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
    }


def test_quantiles_mean_and_misranked_share_by_hand():
    margins = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.4])
    measured = margin_telemetry(margins, torch.tensor([1.0, 0, 0, 2, 5]), torch.tensor([0.0, 1, 0, 3, 1]))
    assert measured["margin/p10"] == pytest.approx(0.04, abs=1e-7)
    assert measured["margin/p50"] == pytest.approx(0.2, abs=1e-7)
    assert measured["margin/p90"] == pytest.approx(0.36, abs=1e-7)
    assert measured["margin/mean"] == pytest.approx(0.2, abs=1e-7)
    assert measured["margin/misranked_share"] == 2 / 5  # the tie is not misranked


def test_correlations_are_those_of_numpy():
    given = pairs(40)
    margins = torch.rand(40, generator=torch.Generator().manual_seed(9))
    measured = margin_telemetry(margins, **given)
    gap = (given["chosen_rewards"] - given["rejected_rewards"]).numpy()
    chosen, rejected = given["chosen_embeddings"].numpy(), given["rejected_embeddings"].numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(chosen, rejected, strict=True)]
    expected = np.corrcoef([margins.numpy(), gap, cosines])[0]
    assert measured["margin/gap_correlation"] == pytest.approx(expected[1], abs=1e-6)
    assert measured["margin/similarity_correlation"] == pytest.approx(expected[2], abs=1e-6)


def test_the_two_terms_add_up_to_the_unscaled_margin():
    given = pairs(12)
    transport = optimal_transport_margins(**given)
    measured = margin_telemetry(3 * transport.margins, **given, transport=transport)
    terms = measured["margin/reward_term_mean"] + measured["margin/semantic_term_mean"]
    assert 3 * terms == pytest.approx(measured["margin/mean"], abs=1e-6)
    for term, values in (("reward", transport.reward_terms), ("semantic", transport.semantic_terms)):
        expected = np.quantile(values.numpy(), [0.1, 0.5, 0.9])
        found = [measured[f"margin/{term}_term_p{share}"] for share in (10, 50, 90)]
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_the_plan_is_reported_with_its_residual():
    given = pairs(12)
    transport = optimal_transport_margins(**given, max_iterations=1, epsilon=0.01)
    measured = margin_telemetry(transport.margins, **given, transport=transport)
    assert measured["margin/residual"] == transport.residual > 0
    assert measured["margin/converged"] == 0.0
    assert measured["margin/transport_cost"] == pytest.approx(float((transport.plan * transport.cost).sum()))


def test_absolute_margins_fall_with_the_size_of_the_gap():
    given = pairs(64)
    given["chosen_rewards"] = given["rejected_rewards"] + torch.rand(64).abs() * 4
    transport = optimal_transport_margins(**given, reading="pair")
    measured = margin_telemetry(transport.margins, **given, transport=transport)
    assert measured["margin/gap_correlation"] < -0.8
    assert measured["margin/misranked_share"] == 0.0


def test_without_a_plan_there_are_only_measures_of_the_margins():
    given = pairs(6)
    measured = margin_telemetry(torch.arange(6.0), given["chosen_rewards"], given["rejected_rewards"])
    assert set(measured) == ALWAYS | {"margin/gap_correlation"}


def test_a_single_pair_has_no_correlation_and_no_nan():
    given = pairs(1)
    transport = optimal_transport_margins(**given)
    measured = margin_telemetry(transport.margins, **given, transport=transport)
    assert set(measured) >= ALWAYS
    assert not [name for name in measured if "correlation" in name]
    assert all(map(math.isfinite, measured.values()))


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.5, 1e-30])
def test_a_constant_margin_leaves_correlations_out_instead_of_calling_them_zero(constant):
    measured = margin_telemetry(torch.full((7,), constant, dtype=torch.float64), **pairs(7))
    assert set(measured) == ALWAYS


def test_equal_gaps_leave_only_the_correlation_with_similarity():
    given = pairs(7) | {"chosen_rewards": torch.zeros(7), "rejected_rewards": torch.zeros(7)}
    measured = margin_telemetry(torch.rand(7), **given)
    assert set(measured) == ALWAYS | {"margin/similarity_correlation"}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_correlation_does_not_depend_on_the_unit_even_at_extremes(scale):
    given, margins = pairs(9), torch.rand(9, generator=torch.Generator().manual_seed(3))
    plain = margin_telemetry(margins, **given)["margin/gap_correlation"]
    scaled = margin_telemetry(margins * scale, **given)["margin/gap_correlation"]
    assert scaled == pytest.approx(plain, abs=1e-6)


def test_gaps_of_half_precision_rewards_are_not_rounded_to_half_precision():
    chosen, rejected = torch.tensor([8.0, 8.0, 8.0]).bfloat16(), torch.tensor([0.01, 0.0, -0.01]).bfloat16()
    measured = margin_telemetry(torch.tensor([1.0, 2.0, 3.0]), chosen, rejected)
    assert measured["margin/gap_correlation"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_rewards": torch.zeros(4, 1)}, r"'chosen_rewards': \(4, 1\)"),
        ({"rejected_rewards": torch.tensor([0, 0, math.nan, 0])}, "'gap' has 1 of 4 entries that are not"),
        ({"rejected_embeddings": None}, "embeddings are given for one side only"),
        ({"rejected_embeddings": torch.zeros(3, 5)}, r"'rejected_embeddings': \(3, 5\)"),
        ({"chosen_embeddings": torch.zeros(3, 5)}, r"'chosen_embeddings': \(3, 5\) do not fit 4 margins"),
    ],
)
def test_bad_inputs_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        margin_telemetry(torch.rand(4), **(pairs(4) | changes))


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="no pairs to summarize"):
        margin_telemetry(*torch.zeros(3, 0))


def test_a_plan_over_other_pairs_is_refused():
    with pytest.raises(ValueError, match=r"'transport\.margins': \(5,\)"):
        margin_telemetry(torch.rand(4), **pairs(4), transport=optimal_transport_margins(**pairs(5)))


def test_columns_instead_of_one_margin_a_pair_are_refused():
    column = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"shape \(B,\); got \(4, 1\)"):
        margin_telemetry(column, column, column)
