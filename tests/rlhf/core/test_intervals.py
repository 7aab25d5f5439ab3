"""Intervals, against published values, scipy and values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlhf.core.intervals import mean_with_interval, preference_accuracy, wilson_interval


def test_wilson_intervals_have_their_published_values():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_without_a_trial_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (5, 8), (404, 553), (1, 1)])
def test_wilson_interval_is_that_of_scipy(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, trials), (expected.low, expected.high), atol=1e-12)


def test_rounding_never_pushes_an_extreme_interval_out_of_0_and_1():
    assert min(wilson_interval(0, trials)[0] for trials in range(1, 2000)) >= 0
    assert max(wilson_interval(trials, trials)[1] for trials in range(1, 2000)) <= 1


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_the_interval_holds_the_value_and_stays_inside_0_and_1(trials, share):
    halves = round(share * 2 * trials) / 2
    low, high = wilson_interval(halves, trials)
    assert 0 <= low <= halves / trials + 1e-12
    assert halves / trials - 1e-12 <= high <= 1


def test_half_a_success_widens_the_interval_smoothly():
    low, half, high = (wilson_interval(count, 10) for count in (4, 4.5, 5))
    assert low[0] < half[0] < high[0]
    assert low[1] < half[1] < high[1]


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="11 of 10"):
        wilson_interval(11, 10)


def test_an_accuracy_counts_ties_as_halves():
    found = preference_accuracy([2.0, 0.5, 0.0, -1.0])
    assert (found.value, found.pairs, found.ties) == (2.5 / 4, 4, 1)
    assert (found.low, found.high) == wilson_interval(2.5, 4)


def test_the_interval_of_a_mean_is_students():
    # Of 1, 2, 3: t(2 degrees of freedom) = 4.302653, standard error 1 / sqrt(3).
    found = mean_with_interval(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-6)


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25, 0.25]])
def test_values_that_do_not_vary_are_their_own_interval(values):
    found = mean_with_interval(np.array(values))
    assert found.low == found.value == found.high == pytest.approx(values[0])
