"""Intervals of differences over seeds and prompts: what they cover, what they find, and what they say is needed."""

import numpy as np
import pytest

from launch.study.statistics import Design, compare, deciding_design, group_means


def differences(generator, *, seeds, prompts, difference=0.0, by_seed=0.0, by_prompt=0.0, rest=0.3):
    """A crossed table of differences with known parts."""
    return (
        difference
        + generator.normal(0, by_seed, (seeds, 1))
        + generator.normal(0, by_prompt, (1, prompts))
        + generator.normal(0, rest, (seeds, prompts))
    )


def decisions(generator, *, seeds, prompts, difference):
    """Right or wrong of two variants, a pair at a time: hard pairs are hard for both, and seeds differ in skill."""
    hard = generator.normal(0, 1.5, prompts)
    found = []
    for skill in (1.0 + difference, 1.0):
        of_seed = generator.normal(skill, 0.05, (seeds, 1))
        found.append(generator.random((seeds, prompts)) < 1 / (1 + np.exp(-(of_seed - hard))))
    return found[0].astype(float) - found[1]


def test_an_effect_of_three_points_is_found():
    generator, found = np.random.default_rng(0), []
    for number in range(100):
        values = differences(generator, seeds=5, prompts=2000, difference=0.03, by_seed=0.004, by_prompt=0.2)
        found.append(compare(values, np.ones(2000), seed=number, draws=200))
    assert sum(each.low > 0 for each in found) >= 95
    assert np.mean([each.difference for each in found]) == pytest.approx(0.03, abs=0.003)


@pytest.mark.parametrize(
    ("seeds", "prompts", "parts"),
    [
        (3, 353, {"by_seed": 0.01, "by_prompt": 0.2}),
        (5, 100, {"by_seed": 0.05}),
        (2, 200, {"by_seed": 0.02, "by_prompt": 0.2}),
        (10, 60, {"by_prompt": 0.5, "rest": 0.1}),
        (1, 300, {"by_prompt": 0.2}),
    ],
    ids=["both", "seeds", "two seeds", "prompts", "one seed"],
)
def test_where_there_is_no_effect_the_interval_says_so(seeds, prompts, parts):
    generator, undecided = np.random.default_rng(1), 0
    for number in range(200):
        values = differences(generator, seeds=seeds, prompts=prompts, **parts)
        undecided += not compare(values, np.ones(prompts), seed=number, draws=200).is_decided
    assert undecided >= 0.95 * 200 - 4  # 95 %, less what 200 repetitions may miss by chance


def test_decisions_that_do_not_differ_stay_undecided():
    generator = np.random.default_rng(2)
    undecided = sum(
        not compare(decisions(generator, seeds=5, prompts=353, difference=0.0), np.ones(353), draws=200).is_decided
        for _ in range(100)
    )
    assert undecided >= 95


def test_what_is_called_detectable_is_found_four_times_in_five():
    generator, parts = np.random.default_rng(3), {"by_seed": 0.02, "by_prompt": 0.1}
    size = dict(seeds=5, prompts=200)
    detectable = np.mean(
        [compare(differences(generator, **size, **parts), np.ones(200), draws=200).detectable for _ in range(100)]
    )
    found = sum(
        compare(differences(generator, difference=detectable, **size, **parts), np.ones(200), draws=200).low > 0
        for _ in range(200)
    )
    assert found >= 160  # more, for intervals are rather too wide than too narrow


def test_the_design_that_is_proposed_shows_the_effect():
    generator, parts = np.random.default_rng(4), {"by_seed": 0.004, "by_prompt": 0.15}
    first = compare(differences(generator, seeds=3, prompts=353, **parts), np.ones(353))
    design = deciding_design(first, 0.02)
    assert design is not None and design.seeds >= 3
    values = [
        differences(generator, seeds=design.seeds, prompts=design.prompts, difference=0.02, **parts) for _ in range(60)
    ]
    assert sum(compare(each, np.ones(design.prompts), draws=100).low > 0 for each in values) >= 45


def test_parts_of_the_variance_are_found_by_hand():
    values = np.array([[1.0, 2.0], [3.0, 4.0]])  # seeds differ by 2, prompts by 1, nothing is left
    found = compare(values, np.ones(2))
    assert found.difference == 2.5
    assert (found.seed_variance, found.prompt_variance, found.rest_variance) == (2.0, 0.5, 0.0)


def test_items_of_one_prompt_are_one_piece_of_evidence():
    generator = np.random.default_rng(5)
    alone = differences(generator, seeds=3, prompts=50, by_prompt=0.3)
    repeated = np.repeat(alone, 20, axis=1)
    means, weights = group_means(repeated, np.ones(1000), np.repeat(np.arange(50), 20))
    np.testing.assert_allclose(means, alone)
    given = compare(alone, np.ones(50))
    assert compare(means, weights).low == pytest.approx(given.low)
    assert compare(repeated, np.ones(1000)).low > given.low


def test_heavy_items_count_by_their_weight():
    values = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert compare(values, np.array([2.0, 1.0, 1.0])).difference == 0.5
    assert compare(values, np.array([2.0, 1.0, 1.0])).low < 0.5 < compare(values, np.array([2.0, 1.0, 1.0])).high


def test_the_same_study_has_the_same_interval():
    values = differences(np.random.default_rng(6), seeds=3, prompts=80)
    assert compare(values, np.ones(80)) == compare(values, np.ones(80))


def test_no_difference_at_all_is_decided_for_nobody():
    found = compare(np.zeros((3, 10)), np.ones(10))
    assert (found.low, found.high, found.is_decided) == (0.0, 0.0, False)
    assert deciding_design(found, 0.01) == Design(seeds=3, prompts=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.zeros((3, 1)), "1 prompt: at least two"), (np.full((2, 4), np.nan), "must be finite")],
)
def test_what_cannot_be_compared_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        compare(values, np.ones(values.shape[1]))


def test_one_seed_proposes_no_design():
    assert deciding_design(compare(np.random.default_rng(7).normal(size=(1, 50)), np.ones(50)), 0.01) is None


@pytest.mark.parametrize("value", [0.1, -0.3, 1 / 3])
@pytest.mark.parametrize("seeds", [1, 3])
def test_one_difference_everywhere_decides_nothing(value, seeds):
    found = compare(np.full((seeds, 7), value), np.arange(1.0, 8.0), draws=100)
    assert found.is_certain and not found.is_decided and found.difference == pytest.approx(value)
    assert not compare(np.full((2, 7), value) + np.eye(2, 7), np.ones(7), draws=100).is_certain
