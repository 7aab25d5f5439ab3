"""``rlhf study``: what it refuses, what it runs, and the line that it ends with."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from launch import stages
from launch.cli import main
from launch.pipeline import run as pipeline_run
from launch.report.page import report_of
from launch.stages import Stage
from launch.study.recipe import load_study
from rlhf.core.errors import ConfigError

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """``study(**fields)``: the path of a study of coins, in whose folder it is run."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{WORKERS}")
    monkeypatch.syspath_prepend(str(WORKERS))
    coin = Stage(
        name="coin", module="coin_stage", config="coin_stage:CoinConfig", metric="eval/accuracy", item="accuracy"
    )
    monkeypatch.setitem(stages.STAGES, "coin", coin)
    command = lambda stage, arguments, machine: [sys.executable, "-m", stage.module, *arguments]  # noqa: E731
    monkeypatch.setattr(pipeline_run, "stage_command", command)
    path = tmp_path / "coins.yaml"

    def write(**fields) -> Path:
        given = {"output": str(tmp_path / "out"), "stage": "coin", "seed_settings": ["seed"], "seeds": [0, 1]}
        given |= {"variants": {"plain": {"skill": 0.5}, "better": {"skill": 0.75}}} | fields
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        return path

    yield write
    sys.modules.pop("coin_stage", None)


def run(path: Path, *words: str) -> int:
    return main(["study", "--config", str(path), "--ranks", "1", "--no-doctor", *words])


def test_a_planted_difference_ends_in_a_verdict_with_its_files_and_its_page(study, tmp_path, capsys):
    path = study(seeds=[0, 1, 2])
    assert run(path) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("better against plain"))
    assert line.endswith(": better.") and "points" in line and "3 seeds, 300 items of 150 prompts" in line
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 6 * 300 and {row["variant"] for row in rows} == {"plain", "better"}
    found = json.loads((tmp_path / "out" / "study.json").read_text())["comparisons"][0]["found"]
    assert found["low"] > 0 and found["difference"] == pytest.approx(0.25, abs=0.06)
    means = [[row["value"] for row in rows if row["variant"] == name] for name in ("better", "plain")]
    by_hand = [sum(map(float, each)) / len(each) for each in means]
    assert found["difference"] == pytest.approx(by_hand[0] - by_hand[1])
    report = report_of([tmp_path / "out"])
    assert any(line.startswith("Study: better against plain") for line in report.lines())
    figures = {figure.key: figure for figure in report.figures}
    band = figures["study-eval-accuracy"].lines[1]
    assert band.name == "better" and len(band.x) == 3 and band.low[2] < band.y[2] < band.high[2]
    assert "study-differences" in figures


def test_a_null_is_printed_as_a_null_with_what_would_decide_it(study, capsys):
    path = study(seeds=[0, 1, 2], variants={"plain": {"skill": 0.6}, "same": {"skill": 0.6}}, smallest=0.02)
    # The same coins for both would be no chance at all.
    text = path.read_text().replace("same:\n    skill: 0.6", "same:\n    skill: 0.601")
    path.write_text(text)
    assert run(path) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("same against plain"))
    assert "undecided" in line and ("would show 2 points" in line or "would have been seen" in line)


def test_less_is_better_where_the_metric_says_so(study, monkeypatch, capsys):
    coin = stages.STAGES["coin"]
    monkeypatch.setitem(stages.STAGES, "coin", Stage(**vars(coin) | {"metric": "-eval/accuracy", "item": "loss"}))
    assert run(study()) == 0
    said = capsys.readouterr().out
    assert ": worse." in said and "points" not in said


def test_another_number_of_the_items_may_count(study, capsys):
    assert run(study(value="second")) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("better against plain"))
    assert "second -0.2" in line and line.endswith(": lower."), "nobody knows whether more of it is better"


@pytest.mark.parametrize("per_line", [2, 3])
def test_all_items_of_a_line_of_the_data_count(study, tmp_path, capsys, per_line):
    assert run(study(set={"per_line": per_line})) == 0
    assert "2 seeds, 300 items of 150 prompts" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    names = [row["row"] for row in rows if (row["variant"], row["seed"]) == ("plain", "0")]
    assert len(set(names)) == 300 and names[:2] == ["rows:0", "rows:0 no. 2"]


def test_the_page_follows_a_verdict_that_changed_although_no_run_did(study, tmp_path, capsys):
    path = study()
    assert run(path) == 0
    assert run(path, "baseline=better") == 0
    assert "plain against better: accuracy" in (tmp_path / "out" / "report.html").read_text()


def test_a_number_that_the_items_lack_is_named(study, capsys):
    assert run(study(value="third")) == 2
    assert "value = third: rows:0 has none; there are second, value" in capsys.readouterr().err


def test_what_failed_is_left_out_and_said(study, tmp_path, capsys):
    path = study(variants={"plain": {}, "broken": {"fails": True}, "better": {"skill": 0.8}})
    assert run(path) == 1
    said = capsys.readouterr().out
    assert "broken against plain: nothing to compare yet: no seed is finished in both." in said
    assert "better against plain" in said and ": better." in said
    assert "this cannot work" in (tmp_path / "out" / "study.md").read_text()


def test_finished_runs_are_not_made_again_and_further_seeds_join_them(study, tmp_path, capsys):
    path = study(seeds=[0])
    assert run(path) == 0
    first = (tmp_path / "out" / "better-seed0" / "held_out.jsonl").stat().st_mtime_ns
    assert "With one seed this says nothing of other seeds." in capsys.readouterr().out
    assert run(path, "seeds=[0,1]") == 0
    assert (tmp_path / "out" / "better-seed0" / "held_out.jsonl").stat().st_mtime_ns == first
    assert "2 seeds, 300 items of 150 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage": "evaluate"}, r"stage = evaluate: expected one of .*reward"),
        ({"baseline": "other"}, r"baseline = other: no such variant; there are plain, better"),
        ({"seeds": [1, 2, 1]}, r"seeds has 1 twice"),
        ({"variants": {"plain": {}}}, r"variants = .*at least 2"),
        ({"variants": {"plain": {}, "a b": {}}}, r"variants.a b: expected a name"),
        (
            {"variants": {"plain": {"skil": 1}, "better": {}}},
            r"skil.*did you mean skill.*\n    in plain-seed0, plain-seed1",
        ),
        ({"smallest": 0}, r"smallest = 0"),
        ({"seed": 3}, r"seed = 3: unknown key \(did you mean seeds\?\)"),
    ],
)
def test_a_faulty_study_is_refused_before_anything_starts(study, fields, message):
    with pytest.raises(ConfigError, match=message):
        load_study(study(**fields))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("stage: [", (), r"coins\.yaml: while parsing.*line"),
        ("stage: ${nothing}", (), r"Interpolation key 'nothing' not found"),
        ("- 1", (), r"expected a mapping"),
        ("stage: coin", ["seeds"], r"seeds: expected key=value"),
        ("stage: coin", ["seeds=[1"], r"seeds=\[1: while parsing"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(tmp_path, text, overrides, message):
    (tmp_path / "coins.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        load_study(tmp_path / "coins.yaml", overrides)
    assert "\n" not in str(refused.value)


def test_items_that_not_all_runs_have_are_counted(study, tmp_path, capsys):
    assert run(study(variants={"plain": {"skill": 0.5}, "better": {"skill": 0.8, "items": 240}})) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("better against plain"))
    assert "240 items of 120 prompts; 60 items that not all of these runs have left out" in line
    found = json.loads((tmp_path / "out" / "study.json").read_text())["comparisons"][0]
    assert (found["items"], found["dropped"]) == (240, 60)


def test_runs_that_do_not_differ_are_no_evidence(study, capsys):
    assert run(study(variants={"plain": {"skill": 0.6}, "same": {"skill": 0.6}})) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("same against plain"))
    assert line.endswith("prompts): no difference, on any item.")


@pytest.fixture
def tidy(tmp_path):
    """``tidy(rows, **fields)``: the path of a study of a tidy file with these rows."""

    def write(rows, head="variant,seed,row,prompt,value", **fields) -> Path:
        (tmp_path / "results.csv").write_text("\n".join([head, *rows]) + "\n")
        path = tmp_path / "tidy.yaml"
        given = {"output": str(tmp_path / "out"), "results": "./results.csv", "share": True, "item": "accuracy"}
        path.write_text(yaml.safe_dump(given | fields))
        return path

    return write


def rows_of(variant: str, gain: float, part: str = "") -> list[str]:
    shift = round(gain * 101)
    return [
        ",".join(filter(None, [part, variant, str(seed), f"r{n}", f"p{n}", str(float(n * 7919 % 101 < 50 + shift))]))
        for seed in (0, 1)
        for n in range(seed, 200)
    ]


def test_a_tidy_file_of_another_program_ends_in_verdicts_too(tidy, tmp_path, capsys):
    rows = [*rows_of("new", 0.2), *rows_of("old", 0.0)]
    assert main(["study", "--config", str(tidy(rows, baseline="old"))]) == 0
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("new against old"))
    assert line.startswith("new against old: accuracy +19.6 points") and line.endswith(": better.")
    assert "2 seeds, 199 prompts; 1 item that not all of these runs have left out" in line
    written = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert written[0] == "variant,seed,row,prompt,value,weight" and len(written) == 1 + 2 * (200 + 199)
    report = report_of([tmp_path / "out"])
    assert report.lines() == [f"Study: {line}"] and "study-differences" in {figure.key for figure in report.figures}


def test_parts_are_compared_by_themselves(tidy, capsys):
    rows = [row for part, gain in (("right", 0.2), ("wrong", -0.2)) for row in rows_of("new", gain, part)]
    rows += [row for part in ("right", "wrong") for row in rows_of("old", 0.0, part)]
    head = "part,variant,seed,row,prompt,value"
    assert main(["study", "--config", str(tidy(rows, head, baseline="old", better="lower"))]) == 0
    ends = [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines() if " against " in line]
    assert ends == ["worse.", "better."]


def test_a_command_makes_the_file(tidy, tmp_path, capsys):
    rows = [*rows_of("new", 0.2), *rows_of("old", 0.0)]
    path = tidy(rows)
    (tmp_path / "results.csv").rename(tmp_path / "made.csv")
    code = f"import shutil; shutil.copy('{tmp_path}/made.csv', '{tmp_path}/results.csv')"
    words = f'command=[{sys.executable}, -c, "{code}"]'
    assert main(["study", "--config", str(path)]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["study", "--config", str(path), words]) == 0
    assert main(["study", "--config", str(path), f"command=[{sys.executable}, -c, 'raise SystemExit(3)']"]) == 2
    assert "ended with status 3" in capsys.readouterr().err
    assert main(["study", "--config", str(path), "command=[/nowhere]"]) == 2
    assert "command = /nowhere: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "head", "fields", "message"),
    [
        (["a,0,r,p,1"], "variant,seed,row,prompt,number", {}, "no column value; there are variant, seed"),
        ([], "variant,seed,row,prompt,value", {}, "0 variants; a comparison needs two"),
        (["a,0,r,p,1"], "variant,seed,row,prompt,value", {}, "1 variants; a comparison needs two"),
        (
            ["a,0,r,p,x"],
            "variant,seed,row,prompt,value",
            {},
            "results.csv:2: value = x, weight = None: expected",
        ),
        (["a,0,r,p,nan"], "variant,seed,row,prompt,value", {}, "results.csv:2: value = nan"),
        (["a,0,r,p,1,0"], "variant,seed,row,prompt,value,weight", {}, "results.csv:2: value = 1, weight = 0"),
        (["a,0,r,p,1", "a,0,r,p,1"], "variant,seed,row,prompt,value", {}, "results.csv:3: a second row r of a, seed 0"),
        (["a,0"], "variant,seed,row,prompt,value", {}, "results.csv:2: no row; expected a cell for each column"),
        (["1,a"], "value,variant,seed,row,prompt", {}, "results.csv:2: no seed; expected a cell"),
        (["1,a,0,r"], "value,variant,seed,row,prompt", {}, "results.csv:2: no prompt; expected a cell"),
        (["a,0,r,p,1,2"], "variant,seed,row,prompt,value", {}, "results.csv:2: more cells than columns"),
        (["a,--5,r,p,1"], "variant,seed,row,prompt,value", {}, "results.csv:2: seed = --5: expected a whole number"),
        (
            ["a,0,r,p,1", "b,0,r,p,1"],
            "variant,seed,row,prompt,value",
            {"baseline": "c"},
            "no such variant; there are a, b",
        ),
        ([], "variant", {"bettr": "lower"}, 'bettr = "lower": unknown key (did you mean better?)'),
    ],
)
def test_a_file_that_is_not_tidy_is_refused_in_one_message(tidy, capsys, rows, head, fields, message):
    assert main(["study", "--config", str(tidy(rows, head, **fields))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--redo", "new"], ["--any-code"], ["--only", "new"]])
def test_options_that_can_do_nothing_for_results_of_others_are_refused(tidy, capsys, words):
    path = tidy([*rows_of("new", 0.2), *rows_of("old", 0.0)])
    assert main(["study", "--config", str(path), *words]) == 2
    assert f"{words[0]}: {path} has results = " in capsys.readouterr().err


def test_the_shipped_study_is_a_study():
    found = load_study(ROOT / "benchmarks" / "margins_at_work.yaml")
    kinds = {variant: run.config.margin.kind for (variant, _), run in found.runs.items()}
    assert kinds == {"plain": "none", "transport": "ot"} and len(found.runs) == 6
    assert {run.config.train.seed for run in found.runs.values()} == {0, 1, 2}


def test_the_margin_study_is_a_study_of_its_tidy_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "benchmarks" / "margin_study"
    monkeypatch.syspath_prepend(str(folder))
    results = importlib.import_module("results")
    marks = {"OT": "2" * 60, "Bradley-Terry": "2" * 30 + "0" * 30}
    runs = [
        ("0% flipped", method, seed, {"id_test": own, "ood_test": "0120" * 5})
        for method, own in marks.items()
        for seed in (0, 1)
    ]
    prompts = {"id_test": [n // 2 for n in range(60)], "ood_test": [n % 7 for n in range(20)]}
    results.write_results(tmp_path / "results.csv", runs, prompts)
    given = ["command=[]", "results=results.csv", f"output={tmp_path}/out"]
    assert main(["study", "--config", str(folder / "study.yaml"), *given]) == 0
    said = capsys.readouterr().out
    assert "0% flipped, ID: OT against Bradley-Terry: accuracy +50 points" in said and "60 items of 30 prompts" in said
    out = "0% flipped, OOD: OT against Bradley-Terry: accuracy +0 points (2 seeds, 20 items of 7 prompts)"
    assert f"{out}: no difference, on any item." in said
    sys.modules.pop("results")
