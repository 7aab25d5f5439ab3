"""What is read of run folders, and what is said where they cannot be read."""

import json

import pytest

from launch.report.page import report_of
from launch.report.reading import read_lines, read_runs
from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.train.held_out import HELD_OUT, write_held_out
from rlhf.train.status import new_status, write_status
from tests.launch.report.made_up import lines, pipeline, ppo_run, reward_run


def test_a_pipeline_has_its_stages_and_a_stage_is_one_run(tmp_path):
    folder = pipeline(tmp_path / "study")
    assert {run.stage for run in read_runs([folder])} == {"reward", "preference", "ppo", "evaluation"}
    (run,) = read_runs([folder / "reward"])
    assert run.name == "reward" and run.last("eval/accuracy") == 0.75


def test_a_stage_whose_folder_is_elsewhere_is_found_by_the_note_of_its_pipeline(tmp_path):
    away = reward_run(tmp_path / "elsewhere" / "model")
    marker = {"output": str(away), "seconds": 90.0, "parts": {"inputs": {"pairs.jsonl": "12:ab"}}}
    write_json(tmp_path / "study" / ".pipeline" / "judge.json", marker)
    (run,) = read_runs([tmp_path / "study"])
    assert (run.name, run.folder, run.seconds, run.inputs) == ("judge", away, 90.0, {"pairs.jsonl": "12:ab"})


def test_runs_of_two_folders_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path):
    folders = [reward_run(tmp_path / name / "reward") for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/reward", "b/reward"]
    pipelines = [pipeline(tmp_path / name / "run") for name in ("c", "d")]
    assert "c/run/ppo" in {run.name for run in read_runs(pipelines)}


@pytest.mark.parametrize("broken", ['{"step": 3, "loss": ', "[1, 2]", "not json"])
def test_a_broken_line_is_named_and_left_out(tmp_path, broken):
    folder = reward_run(tmp_path / "reward", steps=5)
    text = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*text[:2], broken, *text[2:]]) + "\n")
    (run,) = read_runs([folder])
    assert len(run.columns["loss"][1]) == 5
    assert run.faults == (f"{folder}/metrics.jsonl, line 3: no JSON object; the line is left out",)
    assert any("line 3" in line for line in report_of([folder]).lines())


@pytest.mark.parametrize("end", ["\u2028", "\x85"])
def test_an_end_of_line_of_another_kind_in_a_text_is_part_of_it(tmp_path, end):
    row = {"row": "a:1", "prompt": f"one{end}two"}
    write_held_out(tmp_path, [row, row])
    assert read_lines(tmp_path / HELD_OUT) == ((row, row), ())


def test_the_line_that_is_being_written_is_no_fault(tmp_path):
    folder = reward_run(tmp_path / "reward", steps=5, state="running")
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "lo')
    assert read_runs([folder])[0].faults == ()


def test_lines_without_a_step_are_counted(tmp_path):
    folder = reward_run(tmp_path / "reward", steps=2)
    lines(folder / "metrics.jsonl", [{"loss": 1.0}, {"step": 1, "loss": 2.0}])
    (run,) = read_runs([folder])
    assert run.columns["loss"] == ([1], [2.0])
    assert run.faults == (f"{folder}/metrics.jsonl: 1 lines have no step; they are left out",)


def test_a_value_that_was_not_finite_is_left_out(tmp_path):
    folder = reward_run(tmp_path / "reward", steps=2)
    lines(folder / "metrics.jsonl", [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}])
    assert read_runs([folder])[0].columns["loss"] == ([2], [0.5])


def test_a_run_without_metrics_has_a_page_that_says_so(tmp_path):
    write_status(tmp_path / "reward", new_status("reward", state="failed", reason="no GPU"))
    said = report_of([tmp_path / "reward"]).lines()
    assert any("failed: no GPU" in line for line in said)
    assert any("no metrics.jsonl" in line for line in said)


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: (path / "x").mkdir(parents=True)]
)
def test_a_folder_without_a_run_is_refused(tmp_path, make):
    make(tmp_path / "empty")
    with pytest.raises(
        UserError, match=r"empty: no (such folder|run).*expected the output of a stage, or of a pipeline"
    ):
        read_runs([tmp_path / "empty"])


def test_runs_of_different_stages_are_refused(tmp_path):
    first, second = reward_run(tmp_path / "a"), ppo_run(tmp_path / "b")
    with pytest.raises(UserError, match=r"different stages.*a \(reward\).*b \(ppo\)"):
        read_runs([first, second])
    with pytest.raises(UserError, match=r"different stages.*several stages"):
        read_runs([first, pipeline(tmp_path / "c")])


def test_a_recipe_that_is_no_yaml_leaves_the_rest(tmp_path):
    folder = reward_run(tmp_path / "reward", steps=2)
    (folder / "config.yaml").write_text("a: [")
    (run,) = read_runs([folder])
    assert run.settings == {} and run.metrics
    assert json.loads((folder / "evaluation.json").read_text())["step"] == run.evaluation["step"]
