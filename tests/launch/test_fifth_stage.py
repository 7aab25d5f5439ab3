"""A stage that launch has not heard of is planned, checked and shown by what its recipe says of itself."""

import json
from pathlib import Path

import pytest

from launch.cli import main
from launch.stages import STAGES, Stage

WORKERS = Path(__file__).parent / "workers"


@pytest.fixture
def recipe(monkeypatch, tmp_path, tiny_model):
    """``recipe(*overrides)``: arguments of a run of the fifth stage."""
    monkeypatch.syspath_prepend(WORKERS)
    row = Stage(name="distillation", module="distillation", config="distillation:DistillationConfig")
    monkeypatch.setitem(STAGES, "distillation", row)
    rows = [{"prompt": f"say {number}", "completion": "word " * (1 + number % 5)} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "distillation.yaml"
    path.write_text(
        f"output: {tmp_path}/run\nstudent: {{path: {tiny_model}}}\nteacher: {{path: someone/llama-3.2-1b}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, template: plain, cache_dir: {tmp_path}/cache, eval_share: 0.2}}\n"
    )
    return path


@pytest.fixture
def planned(recipe, capsys):
    """``planned(*settings)``: the plan as JSON, and its exit code."""

    def plan(*settings: str) -> tuple[dict, int]:
        code = main(["plan", "distillation", "--config", str(recipe), "--device", "cpu", "--json", *settings])
        return json.loads(capsys.readouterr().out), code

    return plan


@pytest.fixture
def checked(recipe, capsys):
    """``checked(*settings)``: findings of the doctor by check, and its exit code."""

    def check(*settings: str) -> tuple[dict, int]:
        arguments = ["--config", str(recipe), "--ranks", "2", *(["--set", *settings] if settings else [])]
        code = main(["doctor", "--quick", "--json", *arguments])
        rows: dict[str, list[dict]] = {}
        for row in json.loads(capsys.readouterr().out):
            rows.setdefault(row["check"], []).append(row)
        return rows, code

    return check


def test_its_models_and_batches_are_planned(planned):
    found, code = planned("--host-memory", "64GiB")
    assert code == 0 and found["stage"] == "distillation"
    assert [model["role"] for model in found["models"]] == ["student", "teacher"]
    assert found["models"][1]["parameters"] == 1_235_814_400 and found["models"][1]["trainable"] == 0
    assert found["batches"]["lengths"] == "counted" and 25 < found["batches"]["items"] < 40
    assert {"student: backward pass", "teacher: forward pass"} <= {phase["name"] for phase in found["phases"]}
    assert "best checkpoint" in found["disk"]


def test_what_does_not_fit_gets_the_setting_that_helps(planned):
    device = ("--device", "h100-80gb", "--device-memory", "9GiB", "--rows", "100", "--mean-tokens", "20")
    settings = ("student.path=smollm2-135m", "teacher.path=someone/llama-3-8b", "train.micro_batch_tokens=1024")
    found, code = planned(*settings, *device)
    assert code == 1
    assert "teacher.placement=zero3" in found["next_knob"]
    whole, _ = planned("--host-memory", "64GiB")
    alone, _ = planned("--host-memory", "64GiB", "teacher.path=someone/smollm2-135m")
    less = 4 * (1_235_814_400 - 134_515_008)
    assert whole["host_peak_per_rank"]["bytes"] - alone["host_peak_per_rank"]["bytes"] > 0.9 * less


def test_the_doctor_says_what_the_plan_says(planned, checked):
    plan, _ = planned("--devices-per-node", "2")
    rows, _ = checked()
    (memory,), (disk,) = rows["host memory"], rows["disk"]
    assert memory["values"]["needed_bytes"] == plan["host_peak_per_node"]
    assert disk["values"]["needed_bytes"] == sum(plan["disk"].values())


def test_its_rows_and_models_are_looked_for(checked, tmp_path):
    rows, code = checked("teacher.path=runs/no/teacher", f"judge.path={tmp_path}/judge", "data.eval=none.jsonl")
    assert code == 1
    texts = [row["text"].partition(": ")[0] for row in rows["input files"]]
    assert texts == ["data.eval", "teacher.path", "judge.path"]


def test_its_deepspeed_configurations_are_resolved(checked, recipe, capsys):
    rows, code = checked("teacher.placement=zero7", "engine.deepspeed=zero9")
    assert code == 1
    texts = [row["text"].partition(": ")[0] for row in rows["DeepSpeed ops"] if row["status"] == "failure"]
    assert sorted(texts) == ["engine.deepspeed", "teacher.placement"]
    show = ["ds", "show", "--config", str(recipe), "--stage", "distillation"]
    assert main([*show, "--role", "teacher", "teacher.placement=zero3"]) == 0
    assert json.loads(capsys.readouterr().out)["zero_optimization"]["stage3_param_persistence_threshold"] == 10 * 2048
