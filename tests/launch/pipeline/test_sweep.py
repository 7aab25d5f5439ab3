import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import build_parser, main
from launch.commands import sweep as sweep_command
from launch.pipeline.sweep import paired_objectives, plan_sweep, run_names, split_values
from launch.pipeline.sweep_report import results_of
from policy.preference.config import PreferenceConfig
from rlhf.config import load_config
from rlhf.core.errors import ConfigError
from rlhf.core.intervals import wilson_interval

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("output: runs/tiny\nmodel: {path: m}\ndata: {train: d.jsonl}\n")
    return path


def plan(recipe: Path, *overrides: str):
    return plan_sweep([recipe], overrides, recipe.parent / "sweep")


# Axes and names


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a,b,c", ["a", "b", "c"]),
        ("1e-6", ["1e-6"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{kind: a, weight: 1},{kind: b}", ["{kind: a, weight: 1}", "{kind: b}"]),
        ("'a,b','c'", ["'a,b'", "'c'"]),
        ("'it''s, so',b", ["'it''s, so'", "b"]),
        ("it's,he's", ["it's", "he's"]),
        ("[a,b", ["[a,b"]),
        ("'a,b", ["'a,b"]),
        ("${a.b},c", ["${a.b}", "c"]),
    ],
)
def test_values_are_cut_at_the_commas_outside_of_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_runs_are_the_product_of_the_axes_and_share_the_other_settings(recipe):
    runs = plan(recipe, "loss.kind=sigmoid,ipo", "train.seed=3", "loss.parameters.beta=0.1, 0.5")
    assert [run.name for run in runs] == ["sigmoid-beta_0.1", "sigmoid-beta_0.5", "ipo-beta_0.1", "ipo-beta_0.5"]
    assert [(run.config.loss.kind, run.config.loss.beta) for run in runs] == [
        ("sigmoid", 0.1),
        ("sigmoid", 0.5),
        ("ipo", 0.1),
        ("ipo", 0.5),
    ]
    assert {run.config.train.seed for run in runs} == {3}
    assert [run.config.output for run in runs] == [recipe.parent / "sweep" / run.name for run in runs]
    assert runs[3].settings == {"loss.kind": "ipo", "loss.parameters.beta": "0.5"}


def test_the_arguments_of_a_run_give_its_config_to_the_stage(recipe):
    runs = plan_sweep([recipe], ["loss.kind=sigmoid,ipo"], recipe.parent / "a 'folder', #1: {x}")
    for run in runs:
        given = [word for word in run.arguments if word != "--config"]
        assert load_config(PreferenceConfig, [Path(given[0])], given[1:], program="") == run.config
        assert run.config.output == run.folder


def test_all_stands_for_every_objective_that_reads_pairs(recipe):
    kinds = [run.config.loss.kind for run in plan(recipe, "loss.kind=all")]
    assert kinds == paired_objectives()
    assert {"sigmoid", "simpo", "ot_margin", "margin_sigmoid"} < set(kinds)
    assert not {"kto", "sft"} & set(kinds)
    assert [run.name for run in plan(recipe, "loss.kind=sft,all,sigmoid")][:2] == ["sft", "sigmoid"]


def test_names_are_file_names_and_differ_where_values_do():
    values = ["a/b", "a_b", "a b", "..", "../x", "?", "-1", "1", "x" * 300, "x" * 301, "[a,b]", "ä"]
    names = run_names([{"model.path": value} for value in values] + [{"loss.kind": value} for value in values])
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", name) and len(name) <= 100


def test_a_name_does_not_depend_on_the_other_runs():
    points = [{"model.path": value} for value in ("models/a", "models_a", "b")]
    assert run_names(points) == [run_names([point])[0] for point in points]


def test_names_that_would_be_alike_are_told_apart():
    first, second = {"a.k": "1", "b.k": "2-k_3"}, {"a.k": "1-k_2", "b.k": "3"}
    assert len(set(run_names([first, second]))) == 2


# Refusals, before anything runs


def test_the_problems_of_all_runs_are_named_at_once_with_their_runs(recipe):
    recipe.write_text(recipe.read_text() + "loss: {parameters: {beta: 0.1}}\nreference: {kind: cache}\n")
    with pytest.raises(ConfigError) as refused:
        plan(recipe, "loss.kind=sigmoid,simpo,discopo,orpo", "train.epoch=1")
    text = str(refused.value)
    assert "no run was started" in text
    assert re.search(r"train.epoch.*did you mean train.epochs.*\n\s+in all 4 runs", text)
    assert re.search(r"kind = \"discopo\": no such objective.*\n\s+in discopo", text)


def test_an_objective_without_the_parameter_or_the_reference_of_the_recipe_is_refused(recipe):
    recipe.write_text(recipe.read_text() + "loss: {parameters: {gamma: 1}}\nreference: {kind: cache}\n")
    with pytest.raises(ConfigError) as refused:
        plan(recipe, "loss.kind=sigmoid,simpo,gamma_po,hinge")
    text = str(refused.value)
    assert "3 problems" in text
    assert re.search(r"parameters.gamma = 1: kind = sigmoid takes beta, .*; gamma belongs to .*\n\s+in sigmoid", text)
    assert re.search(r"loss.kind = simpo has no reference: leave the section reference out\n\s+in simpo", text)
    assert "kind = gamma_po" not in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kind=sigmoid"], "nothing to compare"),
        (["loss.kind=a,a"], "no such objective"),
        (["loss.kind=sigmoid,,ipo"], "a value between commas is missing"),
        (["loss.kind=sigmoid,ipo", "output=x"], "--output"),
        (["loss.kind=sigmoid,ipo", "loss.kind=ipo"], "given twice"),
        (["loss.kind=sigmoid,ipo", "data.eval_share=0"], "nothing to compare the runs on"),
        (["loss.kind=sigmoid,ipo", "seed"], "expected key=value"),
    ],
)
def test_what_makes_no_sweep_is_refused(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan(recipe, *overrides)


def test_nothing_starts_if_one_run_is_refused(recipe, stage, capsys):
    code = sweep(recipe, "loss.kind=sigmoid,simpo", "loss.parameters.margin=1")
    assert code == 2 and stage.started == []
    assert "no run was started" in capsys.readouterr().err
    assert not (recipe.parent / "sweep").exists()


def test_settings_may_stand_between_options():
    words = "sweep preference loss.kind=a,b --config r.yaml x=1 --ranks 2 y=2 --config s.yaml z=3"
    options = build_parser().parse_args(words.split())
    assert options.overrides == ["loss.kind=a,b", "x=1", "y=2", "z=3"]
    assert options.config == [Path("r.yaml"), Path("s.yaml")] and options.ranks == 2


def test_an_unknown_option_is_no_setting(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["sweep", "preference", "--config", "r.yaml", "--rank", "2", "loss.kind=a,b"])
    assert "--rank" in capsys.readouterr().err


# Running, with a stand-in for the processes


class Stage:
    """Writes what the stage writes. ``faults``: what to do instead, by objective."""

    accuracies = {"sigmoid": 0.6, "ipo": 0.8, "simpo": 0.7}  # noqa: RUF012

    def __init__(self):
        self.started, self.faults = [], {}

    def __call__(self, command, log: Path, tick) -> int:
        kind = log.parent.name
        self.started.append(kind)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as handle:
            handle.write("step 1/2  ETA 0:00:09  loss 0.69\n[2026-01-01 00:00:00,1] [INFO] [launch.py:1:main] bye\n")
        tick()
        if kind in self.faults:
            return self.faults[kind](log)
        write_run(log.parent, self.accuracies[kind], drift=kind != "simpo")
        return 0


def write_run(folder: Path, accuracy: float, drift: bool = True) -> None:
    low, high = wilson_interval(50 * accuracy, 50)
    interval = {"value": accuracy, "low": low, "high": high, "pairs": 50, "ties": 0}
    evaluation = {"step": 2, "accuracy": interval, "mean_loss": 0.5, "mean_gap": 1.25}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    held_out = {"eval/accuracy": accuracy, "eval/chosen_logprob_per_token": -2.0, "eval/rejected_logprob_per_token": -4}
    if drift:
        held_out |= {"eval/chosen_drift_per_token": -0.25, "eval/rejected_drift_per_token": -1.5}
    rows = [
        {"step": 1, "loss": 0.7, "zero_gradient_share": 0.0, "time/step_seconds": 90.0},
        {"step": 1, **held_out, "eval/chosen_drift_per_token": 9.0},
        {"step": 2, "loss": 0.6, "zero_gradient_share": 0.4, "time/step_seconds": 30.0},
        {"step": 2, **held_out},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def stage(monkeypatch) -> Stage:
    stand_in = Stage()
    monkeypatch.setattr(sweep_command, "run_logged", stand_in)
    return stand_in


def sweep(recipe: Path, *overrides: str) -> int:
    folder = recipe.parent / "sweep"
    return main(["sweep", "preference", "--config", str(recipe), "--ranks", "1", "--output", str(folder), *overrides])


def test_finished_runs_are_skipped_until_their_settings_change(recipe, stage, capsys):
    assert sweep(recipe, "loss.kind=sigmoid,ipo") == 0
    assert stage.started == ["sigmoid", "ipo"]
    assert sweep(recipe, "loss.kind=sigmoid,ipo,simpo") == 0
    assert stage.started == ["sigmoid", "ipo", "simpo"]
    assert "1 of 3  sigmoid  finished before" in capsys.readouterr().out
    (recipe.parent / "sweep" / "ipo" / "evaluation.json").unlink()
    assert sweep(recipe, "loss.kind=sigmoid,ipo") == 0
    assert stage.started[3:] == ["ipo"]
    assert sweep(recipe, "loss.kind=sigmoid,ipo", "optim.learning_rate=1e-5") == 0
    assert stage.started[4:] == ["sigmoid", "ipo"]


def test_a_failed_run_is_reported_with_its_last_line_and_the_others_still_run(recipe, stage, capsys):
    def out_of_memory(log: Path) -> int:
        lines = "Traceback\nRuntimeError: out of memory [x]\n"
        lines += "[2026-01-01 00:00:00,1] [ERROR] [launch.py:3:f] exits with return code = 1\n"
        log.write_text(log.read_text() + lines)
        return 1

    stage.faults["sigmoid"] = out_of_memory
    assert sweep(recipe, "loss.kind=sigmoid,ipo") == 1
    assert stage.started == ["sigmoid", "ipo"]
    folder = recipe.parent / "sweep"
    out = capsys.readouterr().out
    assert f"sigmoid: exit code 1: RuntimeError: out of memory [x] ({folder}/sigmoid/log.txt)" in out
    report = json.loads((folder / "sweep.json").read_text())
    assert [row["name"] for row in report["runs"]] == ["ipo"] and "out of memory" in report["failed"]["sigmoid"]
    assert "out of memory" in (folder / "sweep.md").read_text()
    stage.faults.clear()
    assert sweep(recipe, "loss.kind=sigmoid,ipo") == 0
    assert stage.started[2:] == ["sigmoid"]


def test_a_run_that_ends_without_its_evaluation_has_failed_whatever_its_exit_code(recipe, stage):
    assert sweep(recipe, "loss.kind=sigmoid,ipo") == 0
    stage.faults["ipo"] = lambda log: 0  # as deepspeed does when a rank is killed; the old evaluation.json is there
    assert sweep(recipe, "loss.kind=sigmoid,ipo", "train.seed=1") == 1
    assert sweep(recipe, "loss.kind=sigmoid,ipo", "train.seed=1") == 1
    assert stage.started == ["sigmoid", "ipo", "sigmoid", "ipo", "ipo"]


# The report


def prepared(recipe: Path, **accuracies: float):
    runs = plan(recipe, "loss.kind=" + ",".join(accuracies))
    for run in runs:
        run.folder.mkdir(parents=True)
        write_run(run.folder, accuracies[run.name], drift=run.config.loss.needs_reference)
        run.marker.write_text(json.dumps({"digest": run.digest}))
    return runs


def test_results_are_sorted_and_read_from_the_row_of_the_evaluated_step(recipe):
    results = results_of(prepared(recipe, sigmoid=0.6, ipo=0.8, hinge=0.6))
    assert [result.name for result in results] == ["ipo", "hinge", "sigmoid"]
    best = results[0]
    assert (best.step, best.loss, best.gap) == (2, 0.5, 1.25)
    assert (best.chosen_drift, best.rejected_drift) == (-0.25, -1.5)
    assert best.zero_gradient_share == 0.4
    assert best.minutes == pytest.approx(2.0)  # 90 + 30 seconds


def test_the_drift_of_an_objective_without_reference_starts_where_that_of_the_others_does(recipe):
    runs = prepared(recipe, sigmoid=0.6, simpo=0.7)
    write_metrics = runs[1].folder / "metrics.jsonl"
    write_metrics.write_text(write_metrics.read_text().replace("-2.0", "-1.0"))  # 0.75 above the start of -1.75
    simpo = results_of(runs)[0]
    assert simpo.name == "simpo"
    assert simpo.chosen_drift == pytest.approx(0.75) and simpo.rejected_drift == pytest.approx(-1.5)
    assert results_of(runs[1:])[0].chosen_drift is None


def test_runs_of_another_model_tell_nothing_about_the_start(recipe):
    runs = plan(recipe, "model.path=a,b", "loss.kind=sigmoid,simpo")
    assert [run.name for run in runs][:2] == ["path_a-sigmoid", "path_a-simpo"]
    for run in (runs[0], runs[3]):  # sigmoid on a, simpo on b
        run.folder.mkdir(parents=True)
        write_run(run.folder, 0.5, drift=run.config.loss.needs_reference)
        run.marker.write_text(json.dumps({"digest": run.digest}))
    drifts = {result.name: result.chosen_drift for result in results_of(runs)}
    assert drifts == {"path_a-sigmoid": -0.25, "path_b-simpo": None}


def test_the_report_holds_table_numbers_and_plot(recipe, stage, capsys):
    names = prepared(recipe, sigmoid=0.6, ipo=0.8, simpo=0.7)
    assert sweep(recipe, "loss.kind=sigmoid,ipo,simpo") == 0 and stage.started == []
    folder = names[0].folder.parent
    lines = (folder / "sweep.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(row) for row in table}) == 1
    low, high = wilson_interval(40, 50)
    assert table[2] == ["ipo", "80.0%", f"{low:.1%} to {high:.1%}", "0.500", "1.250", "-0.250", "-1.500", "40%", "2.0"]
    assert [row[0] for row in table[2:]] == ["ipo", "simpo", "sigmoid"]
    report = json.loads((folder / "sweep.json").read_text())
    assert report["runs"][0]["accuracy"]["value"] == 0.8 and report["failed"] == {}
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "80.0%" in out and max(map(len, out.splitlines()[4:12])) <= 120


# Real processes


def test_a_command_is_logged_and_its_whole_group_ends_with_it(tmp_path):
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nprint('here')\n"
    parent += "time.sleep(60)"
    script = (
        "import sys, pathlib; from launch.jobs.launcher import run_logged\n"
        f"run_logged([sys.executable, '-uc', {parent!r}], pathlib.Path('log.txt'), lambda: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    written = tmp_path / "child"
    wait_until(lambda: written.exists() and written.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    assert (tmp_path / "log.txt").read_text() == "here\n"
    wait_until(lambda: not is_running(int(written.read_text())))


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.dist
@pytest.mark.slow
def test_two_objectives_share_the_reference_cache_and_are_compared(
    tmp_path, tiny_model, tiny_pairs, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"output: unused\nmodel: {{path: {tiny_model}}}\n"
        f"data: {{train: {tiny_pairs}, eval_share: 0.2, max_tokens: 128, cache_dir: {tmp_path}/cache}}\n"
        "train: {max_steps: 2, global_batch_size: 8, publish: none}\nengine: {kind: local}\n"
    )
    folder = tmp_path / "sweep"
    words = ["sweep", "preference", "--config", str(recipe), "--output", str(folder), "--ranks", "1"]
    assert main([*words, "loss.kind=sigmoid,apo_hinge_zero"]) == 0, capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2  # of the training and of the held-out pairs
    first, second = ((folder / name / "log.txt").read_text() for name in ("sigmoid", "apo_hinge_zero"))
    assert "reference log-probabilities of" in first and "reference log-probabilities of" not in second
    report = json.loads((folder / "sweep.json").read_text())
    assert {row["name"] for row in report["runs"]} == {"sigmoid", "apo_hinge_zero"}
    for row in report["runs"]:
        assert row["step"] == 2 and None not in row.values()
    assert "| apo_hinge_zero |" in (folder / "sweep.md").read_text()
    out = capsys.readouterr().out
    assert "2 of 2  apo_hinge_zero  done after" in out and "Sweep: 2 runs on 18 held-out pairs" in out
    assert main([*words, "loss.kind=sigmoid,apo_hinge_zero"]) == 0
    assert "2 of 2  apo_hinge_zero  finished before" in capsys.readouterr().out
