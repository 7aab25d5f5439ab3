"""Held-out evaluation, against values worked out by hand and against scipy."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from reward.evaluate import (
    evaluate_pairs,
    evaluation_table,
    expected_calibration_error,
    reliability_curve,
)


def evaluate(gaps, **changes):
    arguments = {"chosen_lengths": np.arange(len(gaps)), "rejected_lengths": np.zeros(len(gaps))} | changes
    return evaluate_pairs(np.asarray(gaps, dtype=float), np.zeros(len(gaps)), **arguments)


def random_evaluation(pairs: int = 553):
    draw = np.random.default_rng(0)
    return evaluate_pairs(
        draw.normal(0.5, 1, pairs),
        draw.normal(0, 1, pairs),
        chosen_lengths=draw.integers(5, 54321, pairs),
        rejected_lengths=draw.integers(5, 54321, pairs),
        chosen_scores=draw.random(pairs),
        rejected_scores=draw.random(pairs),
    )


def test_accuracy_counts_a_tie_as_half_a_pair_and_reports_it():
    measured = evaluate([2.0, 0.5, 0.0, -1.0]).accuracy
    assert (measured.value, measured.pairs, measured.ties) == (2.5 / 4, 4, 1)


def test_mean_loss_is_log_2_for_ties_and_does_not_overflow_on_huge_gaps():
    assert evaluate([0.0, 0.0]).mean_loss == pytest.approx(math.log(2), abs=1e-15)
    assert evaluate([-1e5, 1e5]).mean_loss == pytest.approx(5e4)


def test_mean_loss_by_hand():
    # sigmoid(log 3) = 3/4 and sigmoid(-log 9) = 1/10
    expected = -(math.log(3 / 4) + math.log(1 / 10)) / 2
    assert evaluate([math.log(3), -math.log(9)]).mean_loss == pytest.approx(expected, abs=1e-15)


def test_the_length_baseline_prefers_the_longer_answer_whatever_the_rewards():
    for gaps in ([1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]):
        baseline = evaluate(gaps, chosen_lengths=[9, 9, 3, 1], rejected_lengths=[3, 3, 3, 5]).length_baseline
        assert (baseline.value, baseline.ties) == (2.5 / 4, 1)


def test_length_quartiles_run_from_the_chosen_shorter_to_the_chosen_longer():
    chosen, rejected = [1, 2, 3, 4, 15, 16, 17, 18], [11, 12, 5, 6, 14, 15, 3, 4]
    gaps = [-1.0, -1.0, 1.0, -1.0, 1.0, 0.0, 1.0, 1.0]
    buckets = evaluate(gaps, chosen_lengths=chosen, rejected_lengths=rejected).by_length_difference
    assert [(bucket.smallest, bucket.largest) for bucket in buckets] == [
        (-10, -10),
        (-2, -2),
        (1, 1),
        (14, 14),
    ]
    assert [bucket.accuracy.value for bucket in buckets] == [0.0, 0.5, 0.75, 1.0]


def test_score_buckets_use_the_size_of_the_gap_not_its_sign():
    buckets = evaluate(
        [1.0, -1.0, 1.0, 1.0], chosen_scores=[0.9, 0.2, 0.5, 0.6], rejected_scores=[0.1, 0.3, 0.1, 0.4]
    ).by_score_gap
    assert [round(bucket.smallest, 6) for bucket in buckets] == [0.1, 0.2, 0.4, 0.8]
    assert [bucket.accuracy.value for bucket in buckets] == [0.0, 1.0, 1.0, 1.0]


def test_equal_values_share_a_bucket_and_every_pair_is_in_one():
    one = evaluate([1.0, -1.0, 1.0], chosen_lengths=[5, 5, 5]).by_length_difference
    assert [(bucket.accuracy.pairs, bucket.accuracy.value) for bucket in one] == [(3, 2 / 3)]
    full = random_evaluation()
    for buckets in (full.by_length_difference, full.by_score_gap):
        assert [bucket.accuracy.pairs for bucket in buckets] == [139, 138, 138, 138]


def test_without_scores_there_are_no_score_buckets():
    assert evaluate([1.0, 2.0]).by_score_gap is None


def test_calibration_error_by_hand():
    # two bins: confidence 3/4 with one of two right, confidence 9/10 with all of two right
    gaps = [math.log(3), -math.log(3), math.log(9), math.log(9)]
    assert expected_calibration_error(reliability_curve(gaps)) == pytest.approx((2 * 0.25 + 2 * 0.1) / 4, abs=1e-12)


def test_the_reliability_curve_by_hand():
    gaps = [math.log(3), -math.log(3), 0.0, math.log(9), math.log(99)]
    curve = reliability_curve(gaps)
    assert [each.confidence for each in curve] == pytest.approx([0.5, 0.75, 0.9, 0.99])
    assert [each.accuracy.value for each in curve] == [0.5, 0.5, 1.0, 1.0]
    assert [each.accuracy.pairs for each in curve] == [1, 2, 1, 1]
    stored = evaluate(gaps)
    assert stored.reliability == curve and stored.to_dict()["reliability"][1]["accuracy"]["pairs"] == 2


def test_calibration_error_agrees_with_a_loop_over_the_bins():
    gaps = np.random.default_rng(1).normal(0.3, 2, 400)
    expected = 0.0
    for low in np.arange(10) * 0.05 + 0.5:
        inside = [gap for gap in gaps if low <= 1 / (1 + math.exp(-abs(gap))) < low + 0.05]
        if inside:
            right = sum(gap > 0 for gap in inside)
            expected += abs(right - sum(1 / (1 + math.exp(-abs(gap))) for gap in inside)) / len(gaps)
    assert expected_calibration_error(reliability_curve(gaps)) == pytest.approx(expected, abs=1e-9)


def test_certainty_is_calibrated_when_right_and_worst_when_wrong():
    assert expected_calibration_error(reliability_curve([1e4, 1e4])) == 0.0
    assert expected_calibration_error(reliability_curve([-1e4, -1e4])) == 1.0
    assert expected_calibration_error(reliability_curve([0.0, 0.0])) == 0.0


def test_full_certainty_shares_the_last_bin_with_near_certainty():
    # right at confidence 0.96, wrong at 1: one bin with |1 - 1.96| over two pairs
    assert expected_calibration_error(reliability_curve([math.log(24), -1e4])) == pytest.approx(0.48, abs=1e-12)


def test_reward_statistics_are_over_both_sides():
    measured = evaluate_pairs([3.0, 1.0], [-1.0, 1.0], chosen_lengths=[1, 2], rejected_lengths=[2, 1])
    assert (measured.reward_mean, measured.mean_gap) == (1.0, 2.0)
    assert measured.reward_sd == pytest.approx(math.sqrt(2))


def test_an_offset_on_all_rewards_changes_only_their_mean():
    draw = np.random.default_rng(2)
    chosen, rejected = draw.normal(size=(2, 40)).round(3)
    lengths = {"chosen_lengths": draw.integers(1, 9, 40), "rejected_lengths": draw.integers(1, 9, 40)}
    before = evaluate_pairs(chosen, rejected, **lengths).to_dict()
    after = evaluate_pairs(chosen + 512, rejected + 512, **lengths).to_dict()
    assert after.pop("reward_mean") == pytest.approx(before.pop("reward_mean") + 512)
    for name in ("mean_loss", "calibration_error", "reward_sd", "mean_gap"):
        assert after.pop(name) == pytest.approx(before.pop(name), abs=1e-9)
    for part, other in zip(after.pop("reliability"), before.pop("reliability"), strict=True):
        assert part == other | {"confidence": pytest.approx(other["confidence"], abs=1e-9)}
    assert after == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_lengths": [1, 2]}, r"'chosen_lengths': \(2,\)"),
        (
            {"chosen_lengths": [1, 2, math.nan]},
            "'chosen_lengths' has 1 non-finite entries of 3, the first at 2",
        ),
        ({"chosen_scores": [0.1, 0.2, 0.3]}, "'rejected_scores' is missing"),
        (
            {"chosen_scores": [0, 0, math.inf], "rejected_scores": [0, 0, 0]},
            "'chosen_scores' has 1 non-finite",
        ),
    ],
)
def test_bad_columns_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate([1.0, 2.0, 3.0], **changes)


def test_no_pairs_and_columns_of_columns_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        evaluate([])
    table = np.zeros((3, 1))
    with pytest.raises(ValueError, match=r"shape \(N,\); got \(3, 1\)"):
        evaluate_pairs(table, table, chosen_lengths=table, rejected_lengths=table)


def test_a_non_finite_reward_is_refused_not_ranked():
    with pytest.raises(ValueError, match="'chosen_rewards' has 1 non-finite entries of 2, the first at 1"):
        evaluate([1.0, math.inf])


def test_the_record_survives_json():
    record = random_evaluation().to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["by_score_gap"][0]["accuracy"]["pairs"] == 139


def test_the_table_fits_80_columns_with_nothing_cut_or_wrapped():
    console = Console(width=80, file=io.StringIO())
    console.print(evaluation_table(random_evaluation()))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 2 + 4 + 4 + 5


def test_the_table_leaves_out_score_buckets_that_do_not_exist():
    assert evaluation_table(evaluate([1.0, -1.0])).row_count == 2 + 2 + 5
