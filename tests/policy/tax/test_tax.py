"""What changed between two models by lm-eval's tasks, on results as it gives them, and what is refused."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

from launch.cli import main
from policy.tax.config import TaxConfig
from policy.tax.results import compared, read_tax
from policy.tax.run import evaluate_tax
from rlhf.core.errors import ConfigError
from rlhf.core.findings import read_findings

RIGHT = {"before": [1, 1, 1, 0, 1, 1, 1, 1, 1, 1], "after": [0, 0, 1, 0, 0, 0, 1, 0, 0, 1]}


def result(right, filters=("none",)):
    """As ``lm_eval.simple_evaluate`` gives it: a mean by task, measure and filter, and each item by filter."""
    samples = [
        {"doc_id": place, "filter": way, "metrics": ["acc"], "acc": float(each)}
        for way in filters
        for place, each in enumerate(right)
    ]
    means = {f"acc,{way}": float(np.mean(right)) for way in filters} | {f"acc_stderr,{way}": "N/A" for way in filters}
    perplexity = {"perplexity,none": 7.0 + sum(right)} if filters == ("none",) else {}
    return {
        "results": {"task": {"alias": "task", "sample_len": len(right), **means, **perplexity}},
        "samples": {"task": samples},
        "higher_is_better": {"task": {"acc": True, "perplexity": False}},
        "versions": {"task": 1.0},
    }


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in: the environment of the tests has no lm-eval, which was tried by hand in one of its own."""
    asked = []

    class TaskManager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "task"]

    def simple_evaluate(**given):
        asked.append(given)
        return result(RIGHT["before" if len(asked) == 1 else "after"])

    module, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    module.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    module.__spec__, module.__version__ = ModuleSpec("lm_eval", None), "0.4.13"
    return asked


def test_a_change_is_that_of_the_same_items_with_their_interval():
    (accuracy, perplexity), rows = compared(result(RIGHT["before"]), result(RIGHT["after"]))
    assert (accuracy.before, accuracy.after, accuracy.items) == (0.9, 0.3, 10)
    differences = np.subtract(RIGHT["after"], RIGHT["before"])
    half = 2.2621571628 * differences.std(ddof=1) / np.sqrt(10)  # Student's t, 9 degrees of freedom
    assert accuracy.change.value == pytest.approx(-0.6) and accuracy.change.high == pytest.approx(-0.6 + half)
    assert accuracy.verdict == "cost"
    assert perplexity.change is None and perplexity.verdict == "undecided", "no mean over items"
    assert (
        rows[0] == {"id": "task/0", "task": "task", "measure": "acc", "before": 1.0, "after": 0.0} and len(rows) == 10
    )


def test_the_other_way_round_it_is_a_gain_and_the_same_is_nothing():
    gain, same = (
        compared(result(first), result(second))[0][0]
        for first, second in ((RIGHT["after"], RIGHT["before"]), (RIGHT["after"], RIGHT["after"]))
    )
    assert (gain.verdict, same.verdict) == ("gain", "undecided")


@pytest.mark.parametrize("said", [{}, {"task": {}}, {"task": {"acc": None}}])
def test_where_nobody_says_which_values_are_better_nothing_is_decided(said):
    before, after = ({**result(RIGHT[when]), "higher_is_better": said} for when in ("before", "after"))
    accuracy = compared(before, after)[0][0]
    assert accuracy.change.high < 0 and (accuracy.higher_is_better, accuracy.verdict) == (None, "undecided")


def test_each_filter_is_a_measure_of_its_own():
    both = compared(*(result(RIGHT[when], ("strict", "flexible")) for when in ("before", "after")))[0]
    assert [each.measure for each in both] == ["acc (strict)", "acc (flexible)"] and {each.items for each in both} == {
        10
    }


def test_the_command(lm_eval, tiny_model, tmp_path, capsys):
    models = ["--before", str(tiny_model), "--after", str(tiny_model)]
    more = ["--task", "task", "--limit", "10", "--shots", "2", "--chat", "--device", "cpu", "--precision", "float32"]
    assert main(["evaluate", "tax", *models, *more, "-o", str(tmp_path / "out")]) == 0
    assert "cost" in capsys.readouterr().out
    assert read_tax(tmp_path / "out").tasks[0].change.value == pytest.approx(-0.6)
    assert read_findings(tmp_path / "out")["lm_eval"] == "0.4.13"
    assert (tmp_path / "out" / "items.jsonl").read_text().count("\n") == 10
    given = lm_eval[0]
    assert given["model_args"] == {"pretrained": str(tiny_model), "dtype": "float32"} and given["device"] == "cpu"
    assert (given["limit"], given["num_fewshot"], given["apply_chat_template"]) == (10, 2, True)


def test_what_cannot_be_done_is_refused(lm_eval, tiny_model, tmp_path):
    given = {"output": tmp_path / "out", "before": tiny_model, "after": tiny_model}
    with pytest.raises(ConfigError, match="tasks = other: lm-eval has no such task"):
        evaluate_tax(TaxConfig(tasks=("task", "other"), **given), "cpu")
    with pytest.raises(ConfigError, match=r"include = .*nowhere: no such folder"):
        evaluate_tax(TaxConfig(tasks=("task",), include=tmp_path / "nowhere", **given), "cpu")


def test_without_lm_eval_one_line_says_what_to_install(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    models = ["--before", str(tiny_model), "--after", str(tiny_model)]
    assert main(["evaluate", "tax", *models, "--task", "x", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("lm-eval is not installed: pip install")
