"""Sweeps: pipelines with an entry for each combination of values, and what their runs are worth beside each other."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from launch.cli import build_parser, main
from launch.pipeline.state import Progress
from launch.pipeline.sweep import Sweep, plan_sweep, run_names, split_values
from launch.pipeline.sweep_report import report_of
from launch.stages import STAGES, training
from policy.preference.comparison import paired_objectives
from rlhf.config import load_config
from rlhf.core.errors import ConfigError, UserError
from rlhf.train.status import MINUTES, new_status, write_status

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("output: runs/tiny\nmodel: {path: m}\ndata: {train: d.jsonl}\n")
    return path


def plan(recipe: Path, *overrides: str) -> Sweep:
    return plan_sweep(STAGES["preference"], [recipe], overrides, recipe.parent / "sweep")


def runs_of(recipe: Path, *overrides: str):
    return plan(recipe, *overrides).pipeline.stages


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
    sweep = plan(recipe, "loss.kind=sigmoid,ipo", "train.seed=3", "loss.parameters.beta=0.1, 0.5")
    runs = sweep.pipeline.stages
    assert [run.name for run in runs] == ["sigmoid-beta_0.1", "sigmoid-beta_0.5", "ipo-beta_0.1", "ipo-beta_0.5"]
    assert [(run.config.loss.kind, run.config.loss.beta) for run in runs] == [
        ("sigmoid", 0.1),
        ("sigmoid", 0.5),
        ("ipo", 0.1),
        ("ipo", 0.5),
    ]
    assert {run.config.train.seed for run in runs} == {3}
    assert [run.config.output for run in runs] == [recipe.parent / "sweep" / run.name for run in runs]
    assert sweep.points["ipo-beta_0.5"] == {"loss.kind": "ipo", "loss.parameters.beta": "0.5"}


def test_the_file_of_a_run_gives_its_config_to_the_stage(recipe):
    folder = recipe.parent / "a 'folder', #1: {x}"
    for run in plan_sweep(STAGES["preference"], [recipe], ["loss.kind=sigmoid,ipo"], folder).pipeline.stages:
        run.write_recipe()
        assert load_config(STAGES["preference"].config_class(), [run.recipe], [], program="") == run.config
        assert run.config.output == run.output == folder / run.name


def test_all_stands_for_every_objective_that_reads_pairs(recipe):
    kinds = [run.config.loss.kind for run in runs_of(recipe, "loss.kind=all")]
    assert kinds == [*paired_objectives()]
    assert {"sigmoid", "simpo", "ot_margin", "margin_sigmoid"} < set(kinds)
    assert not {"kto", "sft"} & set(kinds)
    assert [run.name for run in runs_of(recipe, "loss.kind=sft,all,sigmoid")][:2] == ["sft", "sigmoid"]


@pytest.mark.parametrize(
    ("stage", "settings", "axis"),
    [
        ("sft", ["data.train=d"], "optim.weight_decay=0,0.1"),
        ("reward", ["data.train=d"], "margin.kind=ot,none"),
        ("preference", ["data.train=d"], "loss.kind=ipo,sigmoid"),
        ("ppo", ["data.train=d", "reward.path=r", "policy.path=m"], "kl.coefficient=0,0.05"),
    ],
)
def test_every_stage_that_trains_can_be_swept(tmp_path, stage, settings, axis):
    model = [] if stage == "ppo" else ["model.path=m"]
    runs = plan_sweep(training()[stage], [], [*settings, *model, axis], tmp_path).pipeline.stages
    assert len({run.name for run in runs}) == len(runs) == 2
    assert all(run.stage is STAGES[stage] and run.final == tmp_path / run.name / "final" for run in runs)
    words = f"sweep {stage} --config r.yaml --hostfile hosts --grace 5 {axis}".split()
    assert build_parser().parse_args(words).overrides == [axis]


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


def test_nothing_starts_if_one_run_is_refused(recipe, capsys):
    words = ["sweep", "preference", "--config", str(recipe), "--output", str(recipe.parent / "sweep")]
    assert main([*words, "loss.kind=sigmoid,simpo", "loss.parameters.margin=1"]) == 2
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


# Running: toys that take no time


@pytest.fixture
def sweep(training_toys):
    """``sweep(settings)`` sweeps the toy stage; the exit code."""
    recipe = training_toys.folder / "toy.yaml"
    recipe.write_text("output: unused\n")
    folder = training_toys.folder / "out"

    def run(*overrides: str) -> int:
        words = ["sweep", "toy", "--config", str(recipe), "--ranks", "1", "--no-doctor", "--output", str(folder)]
        return main([*words, *overrides])

    return run


def report(toys) -> dict:
    return json.loads((toys.folder / "out" / "sweep.json").read_text())


def test_finished_runs_are_skipped_until_their_settings_change(training_toys, sweep):
    toys = training_toys
    assert sweep("number=1,2") == 0
    assert sweep("number=1,2,3") == 0
    assert [toys.starts(f"number_{number}") for number in (1, 2, 3)] == [1, 1, 1]
    (toys.folder / "out" / "number_2" / "final" / "number").unlink()
    assert sweep("number=1,2") == 0
    assert [toys.starts(f"number_{number}") for number in (1, 2, 3)] == [1, 1, 1], "the earlier run is put aside"
    assert toys.number("number_2") == 2 and (toys.folder / "out" / "number_2.before").is_dir()
    assert sweep("number=1,2", "behave=finished") == 0
    assert (toys.folder / "out" / "number_1.before").is_dir()


def test_a_call_without_several_values_goes_on_with_those_of_the_call_before(training_toys, sweep, capsys):
    assert sweep("number=1,2", "steps=3") == 0
    capsys.readouterr()
    assert sweep() == 0
    said = capsys.readouterr().out
    assert "as an earlier call said: number=1,2 steps=3 (--forget leaves that out)" in said
    assert [training_toys.starts(f"number_{number}") for number in (1, 2)] == [1, 1]
    assert sweep("steps=2", "--dry-run") == 0
    assert "number_1" in capsys.readouterr().out


def test_another_sweep_in_the_folder_and_one_that_forgets_take_nothing_of_the_call_before(training_toys, sweep, capsys):
    assert sweep("number=1,2", "steps=3") == 0
    capsys.readouterr()
    assert sweep("steps=1,2", "--dry-run") == 0
    assert "number_" not in capsys.readouterr().out
    assert sweep("--forget") == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert sweep("number=1") == 2
    said = capsys.readouterr().err
    assert "nothing to compare" in said and "with steps=3 of an earlier call; --forget leaves that out" in said


@pytest.mark.parametrize("what", ["every row", "one file of a folder"])
def test_runs_on_data_that_was_replaced_are_done_again(training_toys, sweep, what):
    data = training_toys.folder / "rows"
    data.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (data / name).write_text("old")
    setting = f"data={data}" if what == "one file of a folder" else f"data={data}/b.jsonl"
    assert sweep("number=1,2", setting) == 0
    (data / "b.jsonl").write_text("new rows")
    assert sweep("number=1,2", setting) == 0
    for name in ("number_1", "number_2"):
        assert (training_toys.folder / "out" / f"{name}.before").is_dir()


def test_a_failed_run_is_reported_with_its_reason_and_the_others_still_run(training_toys, sweep, capsys):
    toys = training_toys
    assert sweep("behave=refuse,crash,finish", "number=4") == 1
    out = capsys.readouterr().out
    assert "behave_refuse failed: exit code 2: toy: this cannot work" in out
    found = report(toys)
    assert [row["name"] for row in found["runs"]] == ["behave_finish"]
    assert found["runs"][0]["settings"] == {"behave": "finish"}
    assert "toy: this cannot work" in found["failed"]["behave_refuse"]
    assert "SIGKILL" in (toys.folder / "out" / "sweep.md").read_text()


def test_a_run_that_lies_about_its_end_has_failed_whatever_its_exit_code(training_toys, sweep):
    assert sweep("behave=lie,finish") == 1
    assert [row["name"] for row in report(training_toys)["runs"]] == ["behave_finish"]
    assert sweep("behave=lie,finish") == 1
    assert training_toys.starts("behave_lie") == 2 and training_toys.starts("behave_finish") == 1


def test_a_sweep_of_a_stage_that_says_nothing_of_comparing_shows_its_metrics(training_toys, sweep, capsys):
    assert sweep("number=3,11,7") == 0
    lines = (training_toys.folder / "out" / "sweep.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["run", "number", "half", "minutes"]
    assert table[2:] == [["number_11", "11", "5.5", "-"], ["number_7", "7", "3.5", "-"], ["number_3", "3", "1.5", "-"]]
    assert (training_toys.folder / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_holds_something_else_is_refused_before_the_first_run(training_toys, sweep, capsys):
    there = training_toys.folder / "out" / "number_2"
    there.mkdir(parents=True)
    (there / "mine.txt").write_text("mine")
    assert sweep("number=1,2,3") == 2
    assert f"{there}: holds something" in (said := capsys.readouterr().err) and "--output FOLDER" in said
    assert training_toys.starts("number_1") == 0


def test_runs_are_reported_also_where_a_later_one_cannot_be_started(training_toys, sweep, monkeypatch):
    start = Progress.start

    def refused(self, stage, decision):
        if stage.name == "number_2":
            raise UserError("not today")
        start(self, stage, decision)

    monkeypatch.setattr(Progress, "start", refused)
    assert sweep("number=1,2") == 2
    assert [row["name"] for row in report(training_toys)["runs"]] == ["number_1"]


def test_where_less_is_better_the_least_comes_first(training_toys, sweep, monkeypatch):
    monkeypatch.setitem(STAGES, "toy", dataclasses.replace(STAGES["toy"], metric="-eval/number"))
    assert sweep("number=3,11,7") == 0
    assert [row["metrics"]["eval/number"] for row in report(training_toys)["runs"]] == [3, 7, 11]


# The report of the preference stage


def finish(sweep: Sweep, name: str, accuracy: float, **logprobs: float) -> None:
    """Leave behind what a finished run does."""
    run, progress = sweep.pipeline.named(name), Progress(sweep.pipeline)
    progress.start(run, progress.decide(run))
    metrics = {
        "eval/accuracy": accuracy,
        "eval/loss": 0.5,
        "eval/gap": 1.25,
        "eval/chosen_logprob_per_token": -2.0,
        "eval/rejected_logprob_per_token": -4.0,
        "zero_gradient_share": 0.4,
        MINUTES: 2.0,
    }
    if run.config.loss.needs_reference:
        metrics |= {"eval/chosen_drift_per_token": -0.25, "eval/rejected_drift_per_token": -1.5}
    interval = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "pairs": 50, "ties": 0}
    status = new_status("preference", state="finished", metrics=metrics | logprobs, step=9)
    write_status(run.output, dataclasses.replace(status, evaluation={"step": 2, "accuracy": interval}))
    progress.finish(run, 1.0)


def prepared(recipe: Path, **accuracies: float) -> Sweep:
    sweep = plan(recipe, "loss.kind=" + ",".join(accuracies))
    for name, accuracy in accuracies.items():
        finish(sweep, name, accuracy)
    return sweep


def drifts(result) -> list[float | None]:
    return [result.metrics.get(f"eval/{side}_drift_per_token") for side in ("chosen", "rejected")]


def test_results_are_sorted_and_say_which_step_was_evaluated(recipe):
    results = report_of(prepared(recipe, sigmoid=0.6, ipo=0.8, hinge=0.6)).results
    assert [result.name for result in results] == ["ipo", "hinge", "sigmoid"]
    assert results[0].step == 2 and results[0].items == 50 and drifts(results[0]) == [-0.25, -1.5]


def test_a_run_of_other_settings_or_without_a_status_is_no_result(recipe):
    sweep = prepared(recipe, sigmoid=0.6, ipo=0.8, hinge=0.7)
    (sweep.pipeline.named("hinge").output / "status.json").unlink()
    assert {result.name for result in report_of(sweep).results} == {"ipo", "sigmoid"}
    changed = plan(recipe, "loss.kind=sigmoid,ipo,hinge", "train.seed=7")
    assert report_of(changed).results == []


def test_a_result_stays_when_its_run_is_started_again_by_hand(recipe):
    sweep = prepared(recipe, sigmoid=0.6, ipo=0.8)
    before = report_of(sweep).results
    for run in sweep.pipeline.stages:
        write_status(run.output, new_status("preference"))
    assert report_of(sweep).results == before and before[0].items == 50


def test_the_drift_of_an_objective_without_reference_starts_where_that_of_the_others_does(recipe):
    prepared(recipe, sigmoid=0.6, hinge=0.5)
    sweep = plan(recipe, "loss.kind=sigmoid,simpo")
    finish(sweep, "simpo", 0.7, **{"eval/chosen_logprob_per_token": -1.0})  # 0.75 above the start of -1.75
    simpo = report_of(sweep).results[0]
    assert simpo.name == "simpo" and drifts(simpo) == pytest.approx([0.75, -1.5])
    alone = plan(recipe, "loss.kind=simpo,orpo")
    assert drifts(report_of(alone).results[0]) == [None, None]


def test_runs_of_another_model_tell_nothing_about_the_start(recipe):
    sweep = plan(recipe, "model.path=a,b", "loss.kind=sigmoid,simpo")
    assert [run.name for run in sweep.pipeline.stages][:2] == ["path_a-sigmoid", "path_a-simpo"]
    finish(sweep, "path_a-sigmoid", 0.5)
    finish(sweep, "path_b-simpo", 0.5)
    found = {result.name: drifts(result)[0] for result in report_of(sweep).results}
    assert found == {"path_a-sigmoid": -0.25, "path_b-simpo": None}


def test_the_report_holds_table_numbers_and_plot(recipe, capsys):
    prepared(recipe, sigmoid=0.6, ipo=0.8, simpo=0.7)
    folder = recipe.parent / "sweep"
    words = ["sweep", "preference", "--config", str(recipe), "--ranks", "1", "--output", str(folder)]
    assert main([*words, "loss.kind=sigmoid,ipo,simpo"]) == 0
    lines = (folder / "sweep.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(row) for row in table}) == 1
    assert table[0][:4] == ["run", "accuracy", "95 % interval", "loss"]
    assert table[2] == ["ipo", "80.0%", "70.0% to 90.0%", "0.500", "1.250", "-0.250", "-1.500", "40%", "2.0"]
    assert [row[0] for row in table[2:]] == ["ipo", "simpo", "sigmoid"]
    found = json.loads((folder / "sweep.json").read_text())
    assert found["runs"][0]["metrics"]["eval/accuracy"] == 0.8 and found["failed"] == {}
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "80.0%" in out and "Sweep: 3 runs on 50 held-out pairs" in out


# Real processes


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
    words = ["sweep", "preference", "--config", str(recipe), "--output", str(folder), "--ranks", "1", "--no-doctor"]
    assert main([*words, "loss.kind=sigmoid,apo_hinge_zero"]) == 0, capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2  # of the training and of the held-out pairs
    logs = folder / "logs"
    first, second = ((logs / name / "rank0.log").read_text() for name in ("sigmoid", "apo_hinge_zero"))
    assert "reference log-probabilities of" in first and "reference log-probabilities of" not in second
    report = json.loads((folder / "sweep.json").read_text())
    assert {row["name"] for row in report["runs"]} == {"sigmoid", "apo_hinge_zero"}
    for row in report["runs"]:
        assert row["step"] == 2 and len(row["interval"]) == 2 and row["items"] == 18
        assert {"eval/accuracy", "eval/chosen_drift_per_token", "zero_gradient_share", MINUTES} <= row["metrics"].keys()
    assert "| apo_hinge_zero |" in (folder / "sweep.md").read_text()
    out = capsys.readouterr().out
    assert "apo_hinge_zero: finished" in out and "Sweep: 2 runs on 18 held-out pairs" in out
    assert main([*words, "loss.kind=sigmoid,apo_hinge_zero"]) == 0
    assert "running" not in capsys.readouterr().out
