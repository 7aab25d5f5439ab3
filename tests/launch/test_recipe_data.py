"""Shipped recipes name splits that their data sets have."""

from pathlib import Path

import pytest
import yaml

CARDS = yaml.safe_load((Path(__file__).parent / "dataset_cards.yaml").read_text())
RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))


def sources_of(recipe):
    """Sources in all data sections of a recipe, with their splits."""
    found = []

    def look(value):
        if isinstance(value, dict):
            for key in ("train", "eval"):
                entries = value.get(key)
                entries = [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else []
                found.extend({"path": entry} if isinstance(entry, str) else entry for entry in entries)
            for inner in value.values():
                look(inner)

    look(yaml.safe_load(recipe.read_text()))
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_splits_that_the_cards_list(recipe):
    for source in sources_of(recipe):
        if Path(source["path"]).suffix:
            continue
        assert source["path"] in CARDS, f"{source['path']}: put the splits of its card into dataset_cards.yaml"
        assert source.get("split", "train") in CARDS[source["path"]]
