"""One draw, against sums written out."""

import numpy as np
import pytest
import torch
from scipy import stats

from policy.generation.draw import FIRST_NUCLEUS, draw_tokens

VOCABULARY = 300  # no multiple of the blocks
ALL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
ALMOST_ONE = 1 - 2.0**-53
CASES = [
    ALL,
    {**ALL, "temperature": 0.6},
    {**ALL, "temperature": 1.7},
    {**ALL, "top_k": 7},
    {**ALL, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.7},
]


def exact(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution drawn from, by a loop over tokens from the likeliest down."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-weights)[: top_k or len(weights)]
    kept, total = np.zeros_like(weights), weights[order].sum()
    for token in order:
        if kept.sum() >= top_p * total:
            break
        kept[token] = weights[token]
    return kept / kept.sum()


def first_above(probabilities: np.ndarray, uniform: float) -> int:
    passed = 0.0
    for token, probability in enumerate(probabilities):
        passed += probability
        if passed > uniform:
            return token
    raise AssertionError("the probabilities do not add up to 1")


def random_logits(rows: int, vocabulary: int = VOCABULARY, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_the_token_is_the_first_whose_cumulative_probability_passes_u(case):
    logits, uniforms = random_logits(500), np.random.default_rng(1).random(500)
    found = draw_tokens(logits, torch.from_numpy(uniforms), **case).tokens
    expected = [first_above(exact(row, **case), u) for row, u in zip(logits.numpy(), uniforms, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_the_distribution(case):
    count = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(2).random(count))
    logits = random_logits(1)
    found = draw_tokens(logits.expand(count, -1), uniforms, **case).tokens
    observed = np.bincount(found.numpy(), minlength=VOCABULARY)
    expected = count * exact(logits[0].numpy(), **case)
    assert not observed[expected == 0].any()
    common = expected >= 5
    observed, expected = (np.append(each[common], each[~common].sum()) for each in (observed, expected))
    filled = expected > 0
    assert stats.chisquare(observed[filled], expected[filled]).pvalue > 0.01


@pytest.mark.parametrize("case", CASES)
def test_logprobs_are_of_the_tempered_distribution_before_it_is_cut(case):
    logits = random_logits(50)
    found = draw_tokens(logits, torch.rand(50, dtype=torch.float64), **case)
    expected = (logits / case["temperature"]).log_softmax(dim=-1).gather(1, found.tokens[:, None]).squeeze(1)
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_entropies_are_of_the_same_distribution_and_tokens_that_are_ruled_out_add_nothing(case):
    logits = random_logits(50) + 200
    logits[::2, : VOCABULARY // 3] = -torch.inf
    found = draw_tokens(logits, torch.rand(50, dtype=torch.float64), **case)
    expected = [stats.entropy(row) for row in (logits.double() / case["temperature"]).softmax(dim=-1).numpy()]
    torch.testing.assert_close(found.entropies.double(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
@pytest.mark.parametrize("vocabulary", [1, 5, 300, 150_000])
def test_a_token_of_probability_0_is_never_drawn(case, uniform, vocabulary):
    logits = random_logits(4, vocabulary, spread=5.0)
    if vocabulary > 2:
        logits[:, 0] = logits[:, -1] = -torch.inf
        logits[1, : vocabulary // 2] = -torch.inf
        logits[2, vocabulary // 2 :] = -torch.inf
    logits[3] = -torch.inf
    logits[3, vocabulary // 2] = 1.0
    found = draw_tokens(logits, torch.full((4,), uniform, dtype=torch.float64), **case)
    assert torch.isfinite(found.logprobs).all()
    assert found.tokens[3] == vocabulary // 2 and found.logprobs[3] == 0.0 and found.entropies[3] == 0.0


def test_a_large_vocabulary_loses_no_digits():
    vocabulary, places = 150_000, torch.linspace(0.0, 0.999999, 64, dtype=torch.float64)
    found = draw_tokens(torch.zeros(64, vocabulary), places, **ALL)
    assert (found.tokens - (places * vocabulary).floor()).abs().max() <= 1
    torch.testing.assert_close(found.logprobs, torch.full((64,), -np.log(vocabulary), dtype=torch.float32))


def test_one_likeliest_token_is_the_largest_logit():
    logits = random_logits(100)
    uniforms = torch.rand(100, dtype=torch.float64)
    assert torch.equal(draw_tokens(logits, uniforms, temperature=1.0, top_k=1, top_p=1.0).tokens, logits.argmax(-1))


def test_of_equal_logits_no_more_than_top_k_are_kept():
    uniforms = torch.linspace(0, ALMOST_ONE, 1000, dtype=torch.float64)
    found = draw_tokens(torch.zeros(1000, VOCABULARY), uniforms, temperature=1.0, top_k=3, top_p=1.0).tokens
    assert len(found.unique()) == 3


def test_a_nucleus_wider_than_the_first_guess_is_found_whole():
    vocabulary = 4 * FIRST_NUCLEUS
    uniforms = torch.linspace(0, ALMOST_ONE, 4 * vocabulary, dtype=torch.float64)
    weights = torch.rand(vocabulary, generator=torch.Generator().manual_seed(0)) + 0.5
    found = draw_tokens(weights.log().expand(len(uniforms), -1), uniforms, temperature=1.0, top_k=0, top_p=0.5).tokens
    kept = exact(weights.log().numpy(), 1.0, 0, 0.5) > 0
    assert kept.sum() > FIRST_NUCLEUS
    assert set(found.tolist()) == set(np.flatnonzero(kept).tolist())


def test_logits_that_are_no_numbers_are_told_by_the_logprobs():
    logits = random_logits(3)
    logits[1, 5] = torch.nan
    for case in CASES:
        found = draw_tokens(logits, torch.rand(3, dtype=torch.float64), **case)
        assert torch.isfinite(found.logprobs).tolist() == [True, False, True]
        assert found.tokens.max() < VOCABULARY
