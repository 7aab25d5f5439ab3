"""Best of n against enumeration, and the command."""

import itertools
import json
import math

import numpy as np
import pytest

from launch.cli import main
from policy.best_of_n.config import BestOfNConfig
from policy.best_of_n.curve import best_of_n, curve, kl_of_best_of_n
from policy.best_of_n.run import evaluate_choices, read_choices
from rlhf.core.errors import DataError


def by_enumeration(proxy, gold, n):
    """The mean over all choices of n samples; among equals, the mean of those that are best."""
    found = []
    for chosen in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[place] for place in chosen)
        found.append(np.mean([gold[place] for place in chosen if proxy[place] == best]))
    return np.mean(found)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_the_expectation_is_the_mean_over_all_choices(n):
    generator = np.random.default_rng(n)
    proxy, gold = generator.normal(size=(4, 7)), generator.normal(size=(4, 7))
    expected = [by_enumeration(*rows, n) for rows in zip(proxy, gold, strict=True)]
    np.testing.assert_allclose(best_of_n(proxy, gold, n), expected)


def test_equal_rewards_share_their_places():
    proxy, gold = [[0.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]], [[5.0, 1.0, 3.0, -1.0], [1.0, 2.0, 3.0, 6.0]]
    for n in (1, 2, 3, 4):
        expected = [by_enumeration(*rows, n) for rows in zip(proxy, gold, strict=True)]
        np.testing.assert_allclose(best_of_n(proxy, gold, n), expected)
    assert best_of_n(proxy, gold, 4)[1] == 3.0, "a reward that tells nothing apart chooses at random"


def test_the_kl_of_n():
    assert kl_of_best_of_n(1) == 0 and kl_of_best_of_n(16) == pytest.approx(math.log(16) - 15 / 16)
    # Of a policy whose samples all differ: n p^(n-1) is the density of the best one's rank p.
    ranks = (np.arange(200_000) + 0.5) / 200_000
    density = 5 * ranks**4
    assert kl_of_best_of_n(5) == pytest.approx(float(np.mean(density * np.log(density))), abs=1e-4)


def test_the_proxy_never_falls_over_n():
    proxy = np.random.default_rng(0).normal(size=(20, 16))
    values = [by_proxy.value for _, _, by_proxy, _ in curve(proxy, -proxy, [1, 2, 4, 8, 16])]
    assert values == sorted(values) and values[-1] == pytest.approx(proxy.max(axis=1).mean())


@pytest.mark.parametrize(
    ("proxy", "gold", "n"), [([[1.0]], [[1.0]], 2), ([[1.0]], [[1.0, 2.0]], 1), ([[1.0]], [[1.0]], 0)]
)
def test_what_is_out_of_range_is_refused(proxy, gold, n):
    with pytest.raises(ValueError, match=r"samples|n = "):
        best_of_n(proxy, gold, n)


def responses(path, counts=(4, 4, 4)):
    rows = [
        {"row": f"p:{prompt}", "sample": sample, "prompt": f"the sun {prompt}", "response": "good " * (sample + 1),
         "ended": True, "wanted": sample}
        for prompt, count in enumerate(counts) for sample in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_writes_numbers_and_a_curve(tmp_path, monkeypatch, capsys):
    (tmp_path / "choosers.py").write_text(
        "def length(prompts, responses): return [len(text) for text in responses]\n"
        "def wanted(prompts, responses, *, wanted): return [float(-each) for each in wanted]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewards = ["--proxy", "choosers:length", "--gold", "choosers:wanted"]
    given = ["--responses", str(responses(tmp_path / "r.jsonl")), *rewards]
    assert main(["evaluate", "best-of-n", *given, "-o", str(tmp_path / "out")]) == 0
    found = read_choices(tmp_path / "out")
    assert [each.n for each in found] == [1, 2, 4]
    assert found[0].gold.value == -1.5 and found[-1].gold.value == -3
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert items[2] == {"id": "p:2", "proxy": [5, 10, 15, 20], "gold": [0, -1, -2, -3]}
    assert (tmp_path / "out" / "best_of_n.svg").read_text().lstrip().startswith("<?xml")
    assert "Best of n samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "message"),
    [((1, 1), "1 to 1 responses to a prompt"), ((2, 3), "2 to 3 responses"), ((), "there are no response")],
)
def test_samples_that_cannot_be_chosen_from_are_refused(tmp_path, counts, message):
    path = responses(tmp_path / "r.jsonl", counts)
    with pytest.raises(DataError, match=message):
        evaluate_choices(BestOfNConfig(responses=path, proxy="math:isnan", gold="math:isnan", output=tmp_path / "out"))
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl:1: expected row, prompt and response"):
        evaluate_choices(BestOfNConfig(responses=path, proxy="math:isnan", gold="math:isnan", output=tmp_path / "out"))
    path.write_text('{"row": "p:1", "prompt": "a", "response": "b"}\n{"row": "p:1", "pro')
    with pytest.raises(DataError, match=r"r\.jsonl:2: unreadable row: not JSON"):
        evaluate_choices(BestOfNConfig(responses=path, proxy="math:isnan", gold="math:isnan", output=tmp_path / "out"))
