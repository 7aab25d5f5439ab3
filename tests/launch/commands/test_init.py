"""``rlhf init``: a shipped recipe, copied, is one that can be run where it is."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import build_parser, main
from launch.pipeline.recipe import load_pipeline
from launch.stages import STAGES
from rlhf.config import parse_command_line, to_dict
from rlhf.core.paths import shipped_recipes

PIPELINES = [name for name, path in shipped_recipes().items() if "stages" in yaml.safe_load(path.read_text())]
MODULES = {stage.module: stage for stage in STAGES.values()}


OWN = {"preferences.jsonl", "conversations.jsonl", "prompts.jsonl", "question.jsonl"}
"""Files of the user."""


def files_wanted(stages: list[dict[str, Any]]) -> set[str]:
    """Names of the files of data and templates that the settings of stages name, but of the user's and their own."""
    made = tuple(f"{settings['output']}/" for settings in stages)
    named = {*re.findall(r"[\w./-]+\.(?:jsonl|jinja)", str(stages))}
    return {file for file in named - OWN if not file.startswith(made)}


def resolved(command: str) -> list[dict[str, Any]]:
    """The settings of all stages that a command would run."""
    words = shlex.split(command)
    if words[:3] == ["rlhf", "pipeline", "run"]:
        options = build_parser().parse_args(words[1:])
        return [to_dict(stage.config) for stage in load_pipeline(options.recipe, options.overrides).stages]
    places = [place for place, word in enumerate(words) if word in ("--module", "-m")]
    place = next(place for place in places if words[place + 1] in MODULES)  # behind a launcher that is a module itself
    config_class = MODULES[words[place + 1]].config_class()
    return [to_dict(parse_command_line(config_class, words[place + 2 :], program="x", description="").config)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_command_in_the_readme_runs_the_copy_on_files_of_the_copy(name, elsewhere, monkeypatch):
    assert main(["init", "mine", "--recipe", name]) == 0
    monkeypatch.chdir("mine")
    readme = Path("README.md").read_text()
    command = re.search(r"```\n(.*?)```", readme, flags=re.DOTALL)[1].replace("\\\n", " ")
    wanted = files_wanted(resolved(command))
    assert {file for file in wanted if not Path(file).is_file() or "/" in file} == set()
    listed = {*re.findall(r"^\| `(.*?)` \|", readme, flags=re.MULTILINE)}
    assert listed == {path.name for path in Path().iterdir()} - {"README.md"}
    plan = build_parser().parse_args(shlex.split(re.search(r"`rlhf (plan [^`]*)`", readme)[1]))
    assert plan.config == [Path(f"{name}.yaml")]


def test_help_lists_every_recipe_with_a_line_about_it(capsys):
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name}  +\S+ \S", shown, flags=re.MULTILINE) for name in shipped_recipes())


@pytest.mark.parametrize("held", ["notes.txt", ".hidden"])
def test_a_folder_that_holds_something_is_refused_and_left_alone(held, elsewhere, capsys):
    Path("mine").mkdir()
    Path("mine", held).write_text("x")
    assert main(["init", "mine"]) == 2
    assert f"mine: holds {held}; give a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == [held]


def test_a_name_that_does_not_ship_is_answered_with_those_that_do(elsewhere, capsys):
    assert main(["init", "mine", "--recipe", "quikstart"]) == 2
    assert "there are apo_comparison, grpo_math, pipeline, " in capsys.readouterr().err and not Path("mine").exists()


def test_a_folder_below_a_file_is_refused_in_one_line(elsewhere, capsys):
    Path("file").write_text("")
    assert main(["init", "file/mine"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", PIPELINES)
def test_a_shipped_pipeline_runs_from_anywhere_by_name(name, elsewhere):
    stages = resolved(f"rlhf pipeline run shipped:{name}")
    assert all(Path(file).is_file() for file in files_wanted(stages))
    assert all(str(settings["output"]).startswith(("runs/", "models/")) for settings in stages)
