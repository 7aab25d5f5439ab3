from pathlib import Path

import pytest

from launch.pipeline.fingerprint import _paths


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
