"""Every example line of docs/data.md is read as its block says, and nothing else is left unread."""

import json
import re
from pathlib import Path

import pytest

from rlhf.data.doctor import KINDS
from rlhf.data.options import ColumnConfig, ExampleColumns, PromptColumns

TEXT = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
COLUMNS = {"pairs": ColumnConfig, "conversations": ExampleColumns, "prompts": PromptColumns, "labeled": ExampleColumns}
BLOCKS = re.findall(r"```jsonl (\w+)([^\n]*)\n(.*?)```", TEXT, flags=re.S)
LINES = [(kind, settings, line) for kind, settings, block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize(("kind", "settings", "line"), LINES)
def test_an_example_line_is_read_with_its_settings(kind, settings, line):
    given = dict(setting.removeprefix("data.columns.").split("=") for setting in settings.split())
    records, _ = KINDS[kind].read(json.loads(line), COLUMNS[kind](**given), row_id="x:1", source="x")
    for record in records:
        assert "raining?" in record.prompt[-1]["content"] or record.prompt[-1]["role"] == "tool"
        assert set(record.unread) <= {"id", "subset"}
    if kind == "pairs":
        assert {record.chosen[-1]["content"].split(",")[0].rstrip(".") for record in records} == {"Yes"}


def test_there_are_examples_of_every_kind():
    assert {kind for kind, _, _ in LINES} == set(COLUMNS)
    assert len(LINES) > 20
