import pytest
import torch

from rlhf.core.masking import last_token_index, length_mask


def test_a_length_mask_selects_the_first_places_of_each_row():
    expected = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    assert torch.equal(length_mask(torch.tensor([2, 0, 3]), 3), expected)


@pytest.mark.parametrize("length", [-1, 4])
def test_a_length_that_does_not_fit_is_refused_not_cut(length):
    with pytest.raises(ValueError, match=rf"lengths must be in \[0, 3\], not \[1, {length}\]"):
        length_mask(torch.tensor([1, length]), 3)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 1, 1, 0, 0], 2),
        ([0, 0, 1, 1, 1], 4),
        ([0, 1, 1, 0, 0], 2),
        ([1, 0, 1, 0, 0], 2),
        ([1, 0, 0, 0, 0], 0),
        ([1, 1, 1, 1, 1], 4),
    ],
)
def test_the_last_token_is_found_whatever_the_padding(row, expected):
    index = last_token_index(torch.tensor([row, [1, 0, 0, 0, 0]], dtype=torch.bool))
    assert index.tolist() == [expected, 0]
    assert index.dtype == torch.int64


def test_rows_without_a_token_are_refused_by_number():
    mask = length_mask(torch.tensor([2, 0, 1, 0]), 3)
    with pytest.raises(ValueError, match=r"rows without a token: \[1, 3\]"):
        last_token_index(mask)


@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)])
def test_an_integer_mask_or_a_single_row_is_refused(mask):
    with pytest.raises(ValueError, match=r"'token_mask' must be a \(B, T\) bool mask"):
        last_token_index(mask)
