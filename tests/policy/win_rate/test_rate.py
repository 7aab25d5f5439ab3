"""Win rates against another library, planted effects and hand counts."""

import numpy as np
import pytest
import torch

from policy.win_rate.rate import logistic_fit, win_rate


def judged(generator, count, quality, bias):
    """Preferences of a judge who likes long answers: P(win) = sigmoid(quality + bias tanh(d / sd))."""
    own, other = generator.gamma(4, 300, count), generator.gamma(4, 200, count)
    difference = own - other
    logits = quality + bias * np.tanh(difference / difference.std(ddof=1))
    return (generator.random(count) < 1 / (1 + np.exp(-logits))).astype(float), own, other


def test_the_fit_is_that_of_another_library_on_the_same_judgments():
    generator = np.random.default_rng(0)
    won, own, other = judged(generator, 800, 0.3, 1.2)
    soft = np.where(generator.random(800) < 0.2, 0.5, won)  # ties
    difference = own - other
    features = np.column_stack([np.ones(800), np.tanh(difference / difference.std(ddof=1))])
    found = logistic_fit(features, soft)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    inputs, targets = torch.tensor(features), torch.tensor(soft)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weights, targets)
        value.backward()
        return value

    optimizer.step(loss)
    constant, slope = weights.detach().tolist()
    np.testing.assert_allclose(found, [constant, slope], atol=1e-5)
    result = win_rate(soft, own, other)
    assert result.length_controlled.value == pytest.approx(1 / (1 + np.exp(-constant)), abs=1e-5)
    assert result.length_slope == pytest.approx(slope, abs=1e-5)


def test_the_planted_win_rate_is_found_where_the_judge_likes_length():
    """The plain rate is far off: the model's answers are longer."""
    truth = 1 / (1 + np.exp(0.4))
    values, covered = [], 0
    for seed in range(40):
        result = win_rate(*judged(np.random.default_rng(seed), 805, -0.4, 2.0))
        assert result.value > truth + 0.08
        values.append(result.length_controlled.value)
        covered += result.length_controlled.low <= truth <= result.length_controlled.high
    assert np.mean(values) == pytest.approx(truth, abs=0.01)
    assert covered >= 35


def test_the_plain_rate_by_hand():
    result = win_rate([1, 0, 0.5, 1], [5, 5, 5, 5], [5, 5, 5, 5])
    assert (result.value, result.wins, result.losses, result.ties) == (0.625, 2, 1, 1)
    assert result.standard_error == pytest.approx(np.std([1, 0, 0.5, 1], ddof=1) / 2)
    assert result.length_controlled is None, "all are equally long"


def test_judgments_that_length_tells_apart_have_an_end():
    result = win_rate([1, 1, 0, 0] * 10, [9, 8, 1, 2] * 10, [1, 1, 9, 9] * 10)
    assert 0 <= result.length_controlled.value <= 1 and np.isfinite(result.length_slope)


@pytest.mark.parametrize(
    ("given", "message"),
    [(([], [], []), "one at least"), (([1.0], [1], [1, 2]), "as many"), (([1.2], [1], [1]), r"in \[0, 1\]")],
)
def test_what_makes_no_rate_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        win_rate(*given)
