from pathlib import Path

import pytest

from launch.pipeline import fingerprint
from launch.pipeline.fingerprint import Inputs, _paths, parts_of
from launch.runs import Pipeline, PipelineStage
from launch.stages import STAGES
from rlhf.config import load_config
from rlhf.core.files import file_checksum, write_json


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("rows.jsonl", "data/a.jsonl", "data/b.jsonl", "model/config.json", "rules.py", "PROMPTS"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("rows.jsonl", ["rows.jsonl"]),
        (["rows.jsonl", {"path": "data/a.jsonl", "weight": 2}], ["rows.jsonl", "data/a.jsonl"]),
        ({"deep": {"er": ["data/b.jsonl"]}}, ["data/b.jsonl"]),
        ("data/*.jsonl", ["data/a.jsonl", "data/b.jsonl"]),
        ("./model", ["model"]),
        ("rules:score", ["rules.py"]),
        ("PROMPTS", ["PROMPTS"]),
        ("model", []),  # as a word it could be anything
        ("data/none.jsonl", []),
        ("x" * 300, []),
        ("what is this?\nrows.jsonl", []),
        (7, []),
    ],
)
def test_what_settings_name_is_found(folder, value, expected):
    assert [Path(path) for path in _paths({"key": value})] == [Path(each) for each in expected]


def test_a_home_folder_and_an_installed_module_are_found(folder):
    (of_home,) = _paths({"key": "~/rows.jsonl"})
    assert of_home == folder / "rows.jsonl"
    (module,) = _paths({"reward": "launch.quickstart.gold:gold_reward"})
    assert module.name == "gold.py"
    assert [*_paths({"reward": "no.such.module:function"})] == []


def parts(folder: Path, name: str, *overrides: str) -> dict:
    config = load_config(STAGES[name].config_class(), [], [*overrides, f"output={folder}/out"], program="")
    stage = PipelineStage(name=name, stage=STAGES[name], config=config)
    pipeline = Pipeline(name="p", output=folder / "runs", stages=(stage,))
    return parts_of(stage, pipeline, Inputs(folder / "memory.json"), {})


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("sft", ["model.path=model", "data.train=rows.jsonl"]),
        ("ppo", ["policy.path=nowhere", "reward.path=model", "data.train=rows.jsonl"]),
        ("evaluate", ["prompts=rows.jsonl", "policies={after: model}", "reference=nowhere", "reward=x"]),
    ],
)
def test_a_model_folder_is_an_input_also_by_a_bare_word(folder, stage, overrides):
    before = parts(folder, stage, *overrides)["inputs"]
    assert "model" in before
    (folder / "model" / "config.json").write_text("trained again")
    assert parts(folder, stage, *overrides)["inputs"]["model"] != before["model"]


@pytest.mark.parametrize(("stage", "module"), [("import", "launch.importing"), ("sft", "policy")])
def test_the_code_of_a_stage_holds_the_module_that_it_starts(folder, stage, module):
    overrides = ["model.path=model", "data.train=rows.jsonl"] if stage == "sft" else ["source=rows.jsonl"]
    assert module in parts(folder, stage, *overrides)["code"]


def test_thousands_of_files_are_read_once_and_noted_once(tmp_path, monkeypatch):
    folder, memory = tmp_path / "rows", tmp_path / "memory.json"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number}.jsonl").write_text(f"{number}\n")
    written, read = [], []
    monkeypatch.setattr(fingerprint, "write_json", lambda path, value: written.append(write_json(path, value)))
    monkeypatch.setattr(fingerprint, "weights_checksum", lambda path: read.append(path) or file_checksum(path))
    name = Inputs(memory).checksum(folder)
    assert (len(read), len(written)) == (300, 1)
    assert Inputs(memory).checksum(folder) == name
    assert (len(read), len(written)) == (300, 1)
    (folder / "7.jsonl").write_text("8\n")
    assert Inputs(memory).checksum(folder) != name
    assert (len(read), len(written)) == (301, 2)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"rows.jsonl": [1, 2, "old"]}'])
def test_a_memory_that_is_broken_or_of_another_version_is_passed_over(folder, content):
    Path("memory.json").write_text(content)
    assert Inputs(Path("memory.json")).checksum(Path("rows.jsonl")) == file_checksum(Path("rows.jsonl"))
