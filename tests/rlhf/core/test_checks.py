import math

import pytest
import torch

from rlhf.core.checks import check_finite, check_positive, check_range, check_same_shape


def test_unlike_shapes_are_refused_with_every_name_and_shape():
    with pytest.raises(ValueError, match=r"shapes differ: 'chosen': \(3,\), 'margins': \(3, 1\)"):
        check_same_shape(chosen=torch.zeros(3), margins=torch.zeros(3, 1))


def test_equal_shapes_and_absent_tensors_pass():
    check_same_shape(chosen=torch.zeros(2, 3), rejected=torch.ones(2, 3), margins=None)


def test_the_first_tensor_that_is_not_finite_is_named_with_its_count():
    clean, dirty = torch.zeros(4), torch.tensor([0.0, math.nan, math.inf, -math.inf])
    with pytest.raises(ValueError, match="'rewards' has 3 of 4 entries that are not finite"):
        check_finite(clean=clean, absent=None, rewards=dirty)


def test_finite_empty_and_integer_tensors_pass():
    check_finite(values=torch.tensor([1e38]), empty=torch.zeros(0), ids=torch.tensor([3]))


@pytest.mark.parametrize("value", [-0.1, 0.5, math.nan])
def test_a_number_outside_a_half_open_range_is_refused(value):
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 0.5\), not"):
        check_range(0, 0.5, smoothing=value)


def test_the_lower_end_of_a_range_belongs_to_it():
    check_range(0, 0.5, smoothing=0.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_number_that_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match="beta must be greater than 0, not"):
        check_positive(beta=value)
