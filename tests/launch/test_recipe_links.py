"""What shipped recipes say of each other, and how they are started, is true."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    path: text
    for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
    if "stages" not in yaml.safe_load(text := path.read_text("utf-8"))
}
PUBLISHED = {f"{yaml.safe_load(text)['output']}/final" for text in RECIPES.values()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_runs_that_a_recipe_reads_are_those_that_another_writes(path):
    settings = re.sub(r"#.*", "", RECIPES[path])
    assert {*re.findall(r"runs/\S*?/final\b", settings)} <= PUBLISHED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_command_with_a_hostfile_is_for_one_node(path):
    assert not ("--hostfile" in RECIPES[path] and re.search(r"\bevery node\b", RECIPES[path]))
