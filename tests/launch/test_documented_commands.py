"""Every command that README, docs and recipes show is parsed by the parser that would run it."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from launch.cli import build_parser
from launch.pipeline.recipe import load_pipeline
from policy.ppo.config import PpoConfig
from policy.preference.config import PreferenceConfig
from policy.sft.config import SftConfig
from reward.config import RewardConfig
from rlhf.config import parse_command_line

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").rglob("*.md"))]
ALL_RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
PIPELINES = [path for path in ALL_RECIPES if "stages" in yaml.safe_load(path.read_text())]
RECIPES = [path for path in ALL_RECIPES if path not in PIPELINES]
STAGES = {
    "reward": RewardConfig,
    "policy.sft": SftConfig,
    "policy.preference": PreferenceConfig,
    "policy.ppo": PpoConfig,
}


def documented_lines() -> list[str]:
    """Lines of the code blocks of all documents."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
        found += [line.strip().partition("  #")[0] for block in blocks for line in block.splitlines()]
    return found


def comments(recipe: Path) -> list[str]:
    text = recipe.read_text(encoding="utf-8").replace("\\\n#", " ")
    return [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]


def stage_and_arguments(command: str) -> tuple[str, list[str]] | None:
    """The module that a command line starts, if it is a stage, and what it is given."""
    start = re.search(rf"(?:^|\s)(?:--module|-m)\s+({'|'.join(map(re.escape, STAGES))})(?=\s|$)", command)
    return start and (start[1], shlex.split(command[start.end() :]))


SHOWN = sorted({*documented_lines(), *(line for recipe in ALL_RECIPES for line in comments(recipe))})
RLHF = [line for line in SHOWN if re.match(r"(\S*/)?rlhf\s", line)]
STAGE = [line for line in SHOWN if stage_and_arguments(line)]


def test_there_are_commands_to_parse():
    assert len(RLHF) >= 2
    assert {stage_and_arguments(line)[0] for line in STAGE} == {*STAGES}


@pytest.mark.parametrize("command", RLHF)
def test_rlhf_commands_parse(command):
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("command", STAGE)
def test_stage_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage, arguments = stage_and_arguments(command)
    if "--help" not in arguments:
        parse_command_line(STAGES[stage], arguments, program=stage, description="")


@pytest.mark.parametrize("command", [line for line in RLHF if "pipeline run" in line or "pipeline status" in line])
def test_pipeline_commands_resolve(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = build_parser().parse_args(shlex.split(command)[1:])
    load_pipeline(options.recipe, options.overrides)


@pytest.mark.parametrize("recipe", PIPELINES, ids=lambda path: path.name)
def test_a_pipeline_shows_its_command(recipe):
    path = str(recipe.relative_to(ROOT))
    assert any(f"rlhf pipeline run {path}" in line for line in comments(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_shows_its_command_and_is_one_of_that_stage(recipe):
    shown = [stage_and_arguments(line) for line in comments(recipe)]
    path = str(recipe.relative_to(ROOT))
    stages = {found[0] for found in shown if found and path in found[1]}
    assert len(stages) == 1, f"a comment of {path} should show the one command that it is for"
    (stage,) = stages
    invocation = parse_command_line(STAGES[stage], ["--config", str(recipe)], program=stage, description="")
    assert invocation.config.output.parts[0] == "runs"
