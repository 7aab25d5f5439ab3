"""Every command that README, docs and recipes show is parsed by the parser that would run it."""

import re
import shlex
from pathlib import Path

import pytest

from launch.cli import build_parser
from reward.config import RewardConfig
from rlhf.config import parse_command_line

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").rglob("*.md"))]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def shown_commands() -> list[str]:
    """Lines of code blocks, and inline code that is a whole command."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
        found += [line.strip() for block in blocks for line in block.splitlines()]
    recipes = [line.lstrip("# ").strip() for recipe in RECIPES for line in recipe.read_text().splitlines()]
    return sorted({line.partition("  #")[0] for line in found + recipes if line})


def arguments_after(command: str, *starts: str) -> list[str] | None:
    words = shlex.split(command)
    for start in starts:
        wanted = start.split()
        for place in range(len(words)):
            if words[place : place + len(wanted)] == wanted:
                return words[place + len(wanted) :]
    return None


RLHF = [c for c in shown_commands() if re.match(r"(\S*/)?rlhf\s", c)]
REWARD = [c for c in shown_commands() if arguments_after(c, "--module reward", "-m reward") is not None]


def test_there_are_commands_to_parse():
    assert len(RLHF) >= 2 and len(REWARD) >= 2


@pytest.mark.parametrize("command", RLHF)
def test_rlhf_commands_parse(command):
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("command", REWARD)
def test_reward_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = arguments_after(command, "--module reward", "-m reward")
    if "--help" in arguments:
        return
    parse_command_line(RewardConfig, arguments, program="reward", description="")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_parse(recipe):
    invocation = parse_command_line(RewardConfig, ["--config", str(recipe)], program="reward", description="")
    assert invocation.config.output.parts[0] == "runs"
