"""Numbers of benchmarks against calculations by hand, and against the published formulas written down once more."""

from collections import defaultdict

import numpy as np
import pytest

from reward.benchmarks.formulas import FORMULAS, RM_BENCH_STYLES, Scored, measure
from reward.benchmarks.items import BENCHMARKS
from reward.benchmarks.names import NAMES


def item(identity, subset, scores, right=1):
    return Scored(id=str(identity), subset=subset, scores=np.array(scores, float), right=right)


def numbers(name, items):
    return {each.name: each.value for each in measure(FORMULAS[name], items)}


def test_each_benchmark_has_a_name_a_formula_and_a_reader():
    assert NAMES.keys() == FORMULAS.keys() == BENCHMARKS.keys()


def test_pairs_count_ties_half_and_each_subset_has_its_own_line():
    items = [item(0, "a", [2, 1]), item(1, "a", [1, 1]), item(2, "b", [0, 3]), item(3, "b", [5, 4, 6], right=2)]
    found = numbers("pairs", items)
    assert found == pytest.approx({"accuracy": (1 + 0.5 + 0 + 0) / 4, "a": 0.75, "b": 0.0})


# RewardBench


def test_sections_of_reward_bench_weigh_subsets_by_their_published_counts():
    items = [item(n, "alpacaeval-easy", [1, 0]) for n in range(3)] + [item(9, "alpacaeval-easy", [0, 1])]
    items += [item(n, "mt-bench-easy", [0, 1]) for n in range(10, 12)]
    items += [item(20, "mt-bench-hard", [1, 1])]  # a tie is wrong
    items += [item(30, "math-prm", [1, 0]), item(31, "hep-cpp", [0, 1])]
    found = numbers("rewardbench", items)
    chat, reasoning = 0.75 * 100 / 128, 984 / (984 + 164)
    assert found["Chat"] == pytest.approx(chat) and found["Chat Hard"] == 0
    assert found["Reasoning"] == pytest.approx(reasoning)
    assert found["score"] == pytest.approx((chat + 0 + reasoning) / 3), "of the sections that there are"
    assert "Safety" not in found


def test_prior_sets_count_half_a_section():
    items = [item(0, "donotanswer", [1, 0]), item(1, "shp", [0, 1]), item(2, "summarize", [1, 0])]
    assert numbers("rewardbench", items)["score"] == pytest.approx((1 * 1 + 0.5 * 0.5) / 1.5)


# RewardBench 2


def ties_by_the_published_formula(items):
    """``process_single_model`` of allenai/reward-bench, written anew from its description."""
    stats = defaultdict(dict)
    for each in items:
        kind, prompt = each.id.split(":")
        right, wrong = each.scores[: each.right], each.scores[each.right :]
        stats[kind][prompt] = (right.min() - wrong.max() > 0, right.max() - right.min(), right.min() - wrong.max())
    accuracy = {kind: np.mean([value[0] for value in found.values()]) for kind, found in stats.items()}
    both = sorted(stats["ref"].keys() & stats["tied"].keys())
    spread = np.array([stats["tied"][prompt][1] for prompt in both])
    tied = np.array([stats["tied"][prompt][2] for prompt in both])
    hard = np.minimum(tied, [stats["ref"][prompt][2] for prompt in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        last = np.nan_to_num(np.tanh(hard / spread - 1), nan=0.0)
    parts = (accuracy["tied"], accuracy["ref"], (tied > spread).mean(), (hard > spread).mean(), last.mean())
    return float(np.dot((0.30, 0.30, 0.20, 0.20, 0.01), parts))


@pytest.mark.parametrize("seed", range(4))
def test_ties_of_reward_bench_2_are_the_published_formula(seed):
    random = np.random.default_rng(seed)
    items = []
    for prompt in range(40):
        right = int(random.integers(2, 6))
        scores = random.normal(size=right + 5) + np.repeat([1.5, 0], [right, 5])
        items += [item(f"tied:{prompt}", "Ties", scores, right)]
        items += [item(f"ref:{prompt}", "Ties", random.normal(size=6) + 2.0 * (np.arange(6) == 0))]
    items[0] = item("tied:0", "Ties", [1, 1, 0], 2)  # nothing is spread
    items[2] = item("tied:1", "Ties", [1, 1, 1], 2)  # nor is there a gap
    assert numbers("rewardbench2", items)["Ties"] == pytest.approx(ties_by_the_published_formula(items))


def test_one_prompt_of_ties_by_hand():
    items = [item("tied:3", "Ties", [3.0, 2.5, 1.0], right=2), item("ref:3", "Ties", [2.0, 1.7, 0.0])]
    # apart: 1.5 and .3; spread .5: both are right, 1.5 > .5, but .3 < .5
    expected = 0.30 + 0.30 + 0.20 + 0.0 + 0.01 * np.tanh(0.3 / 0.5 - 1)
    assert numbers("rewardbench2", items)["Ties"] == pytest.approx(expected)


def test_reward_bench_2_is_the_mean_of_its_subsets_and_shares_a_tie_for_the_best():
    items = [item(0, "Math", [2, 1, 0, 0]), item(1, "Math", [2, 2, 0, 0]), item(2, "Math", [1, 2, 0, 0])]
    items += [item(3, "Focus", [1, 0, 0, 0])]
    found = numbers("rewardbench2", items)
    assert found["Math"] == pytest.approx((1 + 0.5 + 0) / 3) and found["Focus"] == 1
    assert found["score"] == pytest.approx((0.5 + 1) / 2)


# RM-Bench


@pytest.mark.parametrize("domains", [("chat",), ("chat", "code", "math", "safety")])
def test_rm_bench_is_the_published_matrix(domains):
    random = np.random.default_rng(1)
    items = [
        item(n, domains[n % len(domains)], random.normal(size=6).round(1), 3) for n in range(37 * len(domains) + 2)
    ]
    matrices = {}
    for domain in domains:
        own = [each.scores for each in items if each.subset == domain]
        matrices[domain] = np.mean([s[:3, None] > s[None, 3:] for s in own], axis=0)
    levels = {
        "hard": lambda matrix: np.triu(matrix, 1).sum() / 3,
        "normal": lambda matrix: np.diag(matrix).mean(),
        "easy": lambda matrix: np.tril(matrix, -1).sum() / 3,
    }
    found = numbers("rm-bench", items)
    for level, of in levels.items():
        assert found[level] == pytest.approx(np.mean([of(matrix) for matrix in matrices.values()]))
    by_domain = {domain: np.mean([of(matrix) for of in levels.values()]) for domain, matrix in matrices.items()}
    assert found["score"] == pytest.approx(np.mean(list(by_domain.values())))
    for row, better in enumerate(RM_BENCH_STYLES):
        for column, worse in enumerate(RM_BENCH_STYLES):
            cell = np.mean([matrix[row, column] for matrix in matrices.values()])
            assert found[f"{better} > {worse}"] == pytest.approx(cell)
    if len(domains) > 1:
        assert found["code: hard"] == pytest.approx(levels["hard"](matrices["code"]))
        assert found["math"] == pytest.approx(by_domain["math"])


# JudgeBench, PPE


def test_judge_bench_is_a_micro_average_and_a_tie_is_wrong():
    items = [item(n, "knowledge", [1, 0]) for n in range(3)] + [item(3, "coding", [1, 1])]
    assert numbers("judgebench", items) == pytest.approx({"accuracy": 0.75, "knowledge": 1.0, "coding": 0.0})


def test_ppe_has_pairs_and_the_best_of_many():
    assert numbers("ppe", [item(0, "all", [1, 0]), item(1, "all", [0, 0])]) == {"accuracy": 0.75}
    many = [item(0, "all", [3, 0, 1, 2], right=2), item(1, "all", [1, 1, 0], right=1), item(2, "all", [1, 2, 3], 0)]
    found = numbers("ppe", many)
    assert found["accuracy"] == pytest.approx((0.5 + 0.75) / 2), "an item without right answers has no pairs"
    assert found["best of all"] == pytest.approx((1 + 0.5 + 0) / 3)


# All


def made_up(name, random, count=60):
    """Items of a benchmark with scores of nobody."""
    subsets = {"rewardbench": ("donotanswer", "hep-go", "llmbar-natural"), "rewardbench2": ("Math", "Focus")}
    right, answers = {"rm-bench": (3, 6), "rewardbench2": (1, 4), "ppe": (2, 8)}.get(name, (1, 2))
    names = subsets.get(name, ("all", "other"))
    return [item(n, names[n % len(names)], random.normal(size=answers), right) for n in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_gets_everything_and_its_opposite_nothing(name):
    random = np.random.default_rng(0)
    items = made_up(name, random)
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        judged = [item(e.id, e.subset, sign * (np.arange(len(e.scores)) < e.right), e.right) for e in items]
        for each in measure(FORMULAS[name], judged):
            assert each.value == pytest.approx(expected), each.name


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_knows_nothing_is_near_chance(name):
    chance = {"rewardbench2": 0.25}.get(name, 0.5)
    main, *_ = measure(FORMULAS[name], made_up(name, np.random.default_rng(5), count=600))
    assert main.value == pytest.approx(chance, abs=0.06) and main.low < chance < main.high


@pytest.mark.parametrize("name", ["pairs", "rewardbench", "rm-bench"])
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    random, held, times = np.random.default_rng(7), 0, 120
    for _ in range(times):
        main, *_ = measure(FORMULAS[name], made_up(name, random, count=90), seed=int(random.integers(1e6)))
        held += main.low <= 0.5 <= main.high
    assert held / times >= 0.89


def test_items_of_one_prompt_are_drawn_together():
    """Two values of each prompt that always agree say no more than one: the interval is that of the prompts."""
    random = np.random.default_rng(2)
    right = random.random(100) < 0.5
    items = []
    for prompt, good in enumerate(right):
        items += [item(f"tied:{prompt}", "Ties", [2, 2, 0] if good else [0, 0, 2], 2)]
        items += [item(f"ref:{prompt}", "Ties", [1, 0] if good else [0, 1])]
    ties = {each.name: each for each in measure(FORMULAS["rewardbench2"], items)}["Ties"]
    expected = 1.01 * 2 * 1.96 * (right.std() / 10)
    assert ties.high - ties.low == pytest.approx(expected * 1.01, rel=0.1)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no items"):
        measure(FORMULAS["pairs"], [])
    with pytest.raises(ValueError, match=r"1 items have scores that are not finite, the first is x"):
        measure(FORMULAS["pairs"], [item("x", "all", [np.nan, 1])])
