"""Win rates against another library, planted effects and hand counts."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from policy.judging.win_rate import logistic_fit, win_rate


def judged(generator, count, quality, bias):
    """Preferences of a judge who likes long answers: P(win) = sigmoid(quality + bias tanh(d / sd))."""
    own, other = generator.gamma(4, 300, count), generator.gamma(4, 200, count)
    difference = own - other
    logits = quality + bias * np.tanh(difference / difference.std(ddof=1))
    return (generator.random(count) < 1 / (1 + np.exp(-logits))).astype(float), own, other


def test_the_fit_is_that_of_scikit_learn_on_the_same_judgments():
    generator = np.random.default_rng(0)
    won, own, other = judged(generator, 800, 0.3, 1.2)
    soft = np.where(generator.random(800) < 0.2, 0.5, won)  # ties
    difference = own - other
    features = np.column_stack([np.ones(800), np.tanh(difference / difference.std(ddof=1))])
    found = logistic_fit(features, soft)
    twice, targets = np.vstack([features, features]), np.r_[np.ones(800), np.zeros(800)]
    other_fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    other_fit.fit(twice, targets, sample_weight=np.r_[soft, 1 - soft])
    np.testing.assert_allclose(found, other_fit.coef_[0], atol=2e-4)
    result = win_rate(soft, own, other)
    assert result.length_controlled.value == pytest.approx(1 / (1 + np.exp(-other_fit.coef_[0][0])), abs=1e-4)
    assert result.length_slope == pytest.approx(other_fit.coef_[0][1], abs=2e-4)


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
