"""``rlhf capsule`` and ``rlhf reproduce``: the same run is equal, another seed is different from the first step on."""

import json
import re
import sys
from pathlib import Path

import pytest

from launch import stages
from launch.capsule.capsule import FIRST_ROWS, MOST_ROWS, capsule_of
from launch.capsule.comparing import Verdict, compare_runs
from launch.cli import main
from launch.jobs import launcher
from launch.jobs.launcher import Machine
from launch.pipeline import run as pipeline_run
from launch.stages import Stage
from rlhf.core.code import package_digest
from rlhf.core.files import write_json
from rlhf.engine.ranks import single_rank
from rlhf.train.environment import write_environment
from tests.launch.report.made_up import evaluate_run, pipeline, reward_run

WORKERS = Path(__file__).parents[1] / "study" / "workers"
ROOT = Path(__file__).resolve().parents[3]
ROWS = [{"step": 1, "loss": 1.0, "time/step_seconds": 3.0}, {"step": 2, "loss": 0.5}, {"step": 2, "eval/loss": 0.7}]


def changed(place: int, **values) -> list[dict]:
    return [{**row, **values} if number == place else row for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("now", "kind", "step"),
    [
        (ROWS, "equal", None),
        ([*ROWS, {"step": 3, "loss": 9.0}], "equal", None),
        (changed(0, **{"time/step_seconds": 99.0}), "equal", None),
        (changed(0, loss=1.0 + 1e-12), "within rounding", 1),
        (changed(1, loss=0.5004), "within rounding", 2),
        (changed(1, loss=0.502), "different", 2),
        (changed(2, **{"eval/loss": 0.8}), "different", 2),
        (changed(0, loss=None), "different", 1),
        (ROWS[:1], "different", 2),
        ([], "different", 1),
    ],
)
def test_verdicts_by_hand(now, kind, step):
    found = compare_runs(ROWS, now)
    assert (found.kind, found.step, found.steps) == (kind, step, 3)


@pytest.mark.parametrize(("name", "now"), [("learning_rate", 2e-6), ("critic/learning_rate", 5e-7)])
def test_a_learning_rate_is_another_one_however_small_both_are(name, now):
    verdict = compare_runs([{"step": 1, name: 1e-6}], [{"step": 1, name: now}])
    assert (verdict.kind, verdict.metric) == ("different", name)


def test_a_value_that_was_never_finite_is_equal_to_itself():
    rows = [{"step": 1, "loss": None}]
    assert compare_runs(rows, rows).kind == "equal"


def test_the_line_names_the_metric_and_both_values():
    found = Verdict(kind="different", steps=3, step=1, metric="loss", before=1.0, now=None)
    assert str(found) == "different, first at step 1: loss was 1 and is not there"


@pytest.fixture
def coin(tmp_path, monkeypatch):
    """A finished run of a stage that takes no time, with its capsule."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{WORKERS}")
    monkeypatch.syspath_prepend(str(WORKERS))
    row = {"name": "coin", "module": "coin_stage", "config": "coin_stage:CoinConfig"}
    monkeypatch.setitem(stages.STAGES, "coin_stage", Stage(**row, metric="eval/accuracy"))
    command = lambda stage, arguments, machine: [sys.executable, "-m", stage.module, *arguments]  # noqa: E731
    monkeypatch.setattr(pipeline_run, "stage_command", command)
    (tmp_path / "recipe.yaml").write_text("output: unset\nskill: 0.6\nseed: 4\n")
    (tmp_path / "p.yaml").write_text(
        f"output: {tmp_path}/out\nstages: {{coin: {{kind: coin_stage, recipe: recipe.yaml}}}}\n"
    )
    assert main(["pipeline", "run", str(tmp_path / "p.yaml"), "--no-doctor", "--ranks", "1"]) == 0
    status = json.loads((tmp_path / "out" / "coin" / "status.json").read_text())
    status["stage"] = "coin_stage"
    (tmp_path / "out" / "coin" / "status.json").write_text(json.dumps(status))
    assert main(["capsule", str(tmp_path / "out" / "coin"), "-o", str(tmp_path / "c.json")]) == 0
    return tmp_path / "c.json"


def reproduce(path: Path, name: str, *words: str) -> int:
    return main(["reproduce", str(path), "--output", str(path.parent / name), "--no-doctor", *words])


def test_the_same_run_is_equal_and_another_seed_is_different_from_the_first_step(coin, capsys):
    assert reproduce(coin, "again") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal: all metrics of 3 rows"
    assert reproduce(coin, "other", "seed=6") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("different, first at step 1: eval/accuracy was 0.")


@pytest.mark.parametrize("hosts", [{}, {"a": 4, "b": 4}])
def test_it_has_the_ranks_of_the_capsule_on_this_machine_and_those_of_the_nodes_elsewhere(coin, monkeypatch, hosts):
    coin.write_text(json.dumps(json.loads(coin.read_text()) | {"ranks": 3}))
    seen = []

    def find(ranks, hostfile):
        assert ranks is None, "several nodes refuse it"
        return Machine(hosts=hosts, allocated=bool(hosts))

    def command(stage, arguments, machine):
        seen.append((machine.ranks, dict(machine.hosts)))
        return [sys.executable, "-m", stage.module, *arguments]

    monkeypatch.setattr(launcher, "find_machine", find)
    monkeypatch.setattr(pipeline_run, "stage_command", command)
    assert reproduce(coin, "again") == 0
    assert seen == [(None if hosts else 3, hosts)]


def test_what_is_not_as_it_was_is_named(coin, capsys):
    content = json.loads(coin.read_text())
    content["environment"] = {"packages": {"torch": "1.0"}, "ranks": [{"device": "H100"}]}
    content["code"] = {"rlhf": "another"}
    content["data"] = {"train": {"fingerprint": "abc"}}
    coin.write_text(json.dumps(content))
    assert reproduce(coin, "again") == 0
    said = capsys.readouterr().out
    for line in (
        "torch was 1.0 and is",
        "ranks were H100 and are",
        "the code of rlhf changed",
        "data.train is another one: abc",
    ):
        assert f"not as it was: {line}" in said


def test_the_code_of_a_capsule_is_that_of_the_start_of_the_run(tmp_path):
    folder = reward_run(tmp_path / "reward")
    assert capsule_of(folder).code["rlhf"] == package_digest("rlhf"), "of a run that does not say it, the present one"
    write_json(folder / "environment.json", {"code": {"rlhf": "then", "policy": "no part of it"}})
    assert capsule_of(folder).code == {
        "rlhf": "then", "reward": package_digest("reward"), "ds_configs": package_digest("ds_configs"),
    }  # fmt: skip


def test_a_run_says_by_what_code_it_is_made(tmp_path):
    write_environment(tmp_path, single_rank())
    written = json.loads((tmp_path / "environment.json").read_text())["code"]
    assert written == {name: package_digest(name) for name in ("rlhf", "reward", "policy", "ds_configs")}
    assert None not in written.values() and len(set(written.values())) == 4


def test_a_capsule_of_another_format_is_refused(coin, capsys):
    coin.write_text(json.dumps(json.loads(coin.read_text()) | {"format": 2}))
    assert main(["reproduce", str(coin)]) == 2
    assert "format = 2: this version reads capsules of format 1" in capsys.readouterr().err


def test_a_capsule_stays_small_and_keeps_the_ends(tmp_path):
    capsule = capsule_of(reward_run(tmp_path / "reward", steps=5000))
    steps = [row["step"] for row in capsule.metrics]
    assert len(steps) <= MOST_ROWS + 2 and steps[:FIRST_ROWS] == [*range(1, FIRST_ROWS + 1)] and steps[-1] == 5000
    assert not any(name.startswith(("time/", "memory/")) for row in capsule.metrics for name in row)
    assert len(capsule.samples) == 8 and capsule.recipe["train"]["seed"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipeline, r"4 runs; a capsule holds one stage: give one of .*reward"),
        (evaluate_run, r"without steps or settings"),
        (lambda folder: folder, r"no such folder"),
    ],
)
def test_what_makes_no_capsule_is_refused(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    assert main(["capsule", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "no capsule"), ('{"stage": "reward"}', "no capsule"), ("[]", "no capsule")],
)
def test_a_file_that_is_no_capsule_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    assert main(["reproduce", str(tmp_path / "x.json")]) == 2
    said = capsys.readouterr().err
    assert message in said and "expected a file that rlhf capsule wrote" in said
