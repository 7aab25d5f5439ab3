"""A fifth stage needs one row of the table: it runs in a pipeline, goes on where it was killed, and is swept."""

import json
import shlex
import subprocess

import pytest

from launch.cli import main

CHAIN = {
    "first": {"set": {"number": 1, "steps": 5}},
    "second": {"set": {"number": 10, "steps": 5, "source": "${stages.first.final}"}},
}


@pytest.fixture
def rlhf(training_toys):
    """The command line, with a pipeline of two toys written down."""
    training_toys.write(CHAIN)
    return lambda *words: main([*map(str, words)])


def run_words(toys) -> tuple:
    return ("pipeline", "run", toys.path, "--ranks", 1, "--no-doctor")


def test_it_runs_in_a_pipeline_and_shows_its_key_metric(training_toys, rlhf, capsys):
    assert rlhf(*run_words(training_toys)) == 0
    assert training_toys.number("second") == 11
    said = capsys.readouterr().out
    page = training_toys.folder / "out" / "report.html"
    assert "number 11.0000" in said and said.endswith(f"report: {page}\n")
    assert "<h3>first</h3>" in page.read_text() and "<h3>second</h3>" in page.read_text()
    assert rlhf("pipeline", "status", training_toys.path) == 0
    assert capsys.readouterr().out.count("finished") == 2


@pytest.mark.parametrize("step", [2, 4])
def test_it_goes_on_where_it_was_killed(training_toys, rlhf, monkeypatch, capsys, step):
    monkeypatch.setenv("TOY_KILL_AT", str(step))
    assert rlhf(*run_words(training_toys)) == 1
    capsys.readouterr()
    assert rlhf("pipeline", "status", training_toys.path) == 0
    assert "half done" in capsys.readouterr().out
    folder = training_toys.folder / "out" / "first"
    assert (folder / "checkpoints").read_text() == "x" * (step - 1)
    monkeypatch.delenv("TOY_KILL_AT")
    assert rlhf(*run_words(training_toys)) == 0
    assert training_toys.starts("first") == 2 and (folder / "checkpoints").read_text() == "x" * 5
    assert not folder.with_name("first.before").exists() and training_toys.number("second") == 11


def test_it_is_swept_and_the_sweep_goes_on_where_it_was_killed(training_toys, rlhf, monkeypatch):
    recipe, folder = training_toys.folder / "toy.yaml", training_toys.folder / "out"
    recipe.write_text("output: unused\nsteps: 5\n")
    words = ("sweep", "toy", "--config", recipe, "--output", folder, "--ranks", 1, "--no-doctor", "number=1,2")
    monkeypatch.setenv("TOY_KILL_AT", "3")
    assert rlhf(*words) == 1
    monkeypatch.delenv("TOY_KILL_AT")
    assert rlhf(*words) == 0
    assert [training_toys.starts(f"number_{number}") for number in (1, 2)] == [2, 2]
    rows = json.loads((folder / "sweep.json").read_text())["runs"]
    assert [(row["name"], row["metrics"]["eval/number"]) for row in rows] == [("number_2", 2), ("number_1", 1)]


def test_what_a_pipeline_prints_can_be_typed_by_hand(training_toys, rlhf, capfd, monkeypatch):
    monkeypatch.chdir(training_toys.folder)
    assert rlhf(*run_words(training_toys), "output=out put") == 0
    (line, _) = (line for line in capfd.readouterr().out.splitlines() if " -m toy_stage " in line)
    assert "out put" in line
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (training_toys.folder / "out put" / "first" / "starts").read_text() == "xx"
