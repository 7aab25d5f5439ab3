import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from policy.ppo.telemetry import repetition


@given(st.lists(st.sampled_from([0, 1, 70_000, 2**31 - 1]), max_size=40))
def test_repetition_counts_four_grams_as_a_set_of_tuples_does(tokens):
    grams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
    assert repetition(np.array(tokens, dtype=np.int32)) == repetition(tokens) == expected


def test_a_text_longer_than_sixteen_bits_is_counted_exactly():
    tokens = np.tile(np.arange(70_000), 2)
    assert repetition(tokens) == 1 - 70_000 / (140_000 - 3)
