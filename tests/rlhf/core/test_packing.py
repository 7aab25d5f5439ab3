"""Packed rows by hand, and that each token sees what it sees in its own row."""

import numpy as np
import pytest
import torch

from rlhf.core.packing import COMMON, PADDING, common_prefix, pack, packed_length


def rows(*texts):
    return [np.array([ord(letter) for letter in text]) for text in texts]


def test_a_pair_by_hand():
    packed = pack([rows("pppaa", "pppbbb"), rows("xy", "xz")])
    assert ["".join(chr(token) for token in row if token) for row in packed.tokens.tolist()] == ["pppaabbb", "xyz"]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, *[PADDING] * 5]]
    assert [row[:count] for row, count in zip(packed.places.tolist(), (5, 6, 2, 2), strict=True)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 5, 6, 7],
        [8, 9],
        [8, 10],
    ]


@pytest.mark.parametrize(
    ("texts", "common", "length"),
    [
        (("abc", "abd"), 2, 4),
        (("abc", "xyz"), 0, 6),
        (("ab", "abcd"), 2, 4),  # one is the beginning of the other
        (("abc", "abc"), 3, 3),
        (("abcd", "abxy", "abcz"), 2, 8),
    ],
)
def test_rows_share_what_all_of_them_begin_with(texts, common, length):
    assert (common_prefix(rows(*texts)), packed_length(rows(*texts))) == (common, length)
    assert (pack([rows(*texts)]).segments == COMMON).sum() == common


def test_each_token_sees_exactly_its_own_row_up_to_itself():
    random = np.random.default_rng(0)
    items = []
    for _ in range(7):
        common = random.integers(0, 9, random.integers(0, 6))
        items.append([np.concatenate([common, random.integers(10, 19, random.integers(0, 6) + (not len(common)))])
                      for _ in range(3)])  # fmt: skip
    packed, count = pack(items), 0
    visible = packed.visible()[:, 0]
    width = packed.tokens.shape[1]
    for place, item in enumerate(items):
        for row in item:
            own = packed.places[count, : len(row)] - place * width
            assert torch.equal(packed.tokens[place, own], torch.from_numpy(row))
            assert torch.equal(packed.positions[place, own], torch.arange(len(row)))
            assert torch.equal(visible[place][own][:, own], torch.ones(len(row), len(row)).tril().bool())
            assert visible[place][own].sum() == len(row) * (len(row) + 1) // 2, "nothing of the other rows"
            count += 1
    padding = packed.segments == PADDING
    assert (visible.sum(dim=-1)[padding] == 1).all() and visible.any(dim=-1).all()


def test_states_come_back_where_their_tokens_stand():
    packed = pack([rows("pppaa", "pppbbb"), rows("xy", "xz")])
    states = packed.tokens[..., None].float().expand(-1, -1, 3).requires_grad_()
    found = packed.unpacked(states)
    assert found.shape == (4, 6, 3)
    for row, text in zip(found, ("pppaa", "pppbbb", "xy", "xz"), strict=True):
        assert row[: len(text), 0].tolist() == [ord(letter) for letter in text]
