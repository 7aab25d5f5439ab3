"""Prose wraps at 100 columns; tables, code, and a link or code span that is longer by itself do not."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WIDTH = 100
PROSE = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "ds_configs/*.md", "launch/**/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"\s*(```+|~~~+)")
UNBREAKABLE = re.compile(r"(?:[*+-]|\d+[.)])?\s*[(*]*(`+[^`]+`+|!?\[[^\]]*\]\([^)]*\)|\S+)\S*")


def too_long(text: str) -> Iterator[tuple[int, str]]:
    fence = ""
    for number, line in enumerate(text.splitlines(), start=1):
        found = FENCE.match(line)
        if found and (not fence or found[1].startswith(fence)):
            fence = "" if fence else found[1]
            continue
        table = line.lstrip().startswith("|")
        if len(line) > WIDTH and not fence and not table and not UNBREAKABLE.fullmatch(line.strip()):
            yield number, line


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_wraps_at_100_columns(path):
    found = [f"{path.relative_to(ROOT)}:{number}: {line}" for number, line in too_long(path.read_text("utf-8"))]
    assert not found, "\n".join(found)


LONG = "word " * 30


@pytest.mark.parametrize(
    "text", [LONG, f"* {LONG}", f"## {LONG}", f"```\ncode\n```\n{LONG}", f"[a]({'x' * 90}) {LONG}"]
)
def test_a_long_line_of_prose_is_found(text):
    assert len(list(too_long(text))) == 1


@pytest.mark.parametrize("text", [f"| {LONG} |", f"```\n{LONG}\n```", f"* [a link](https://{'x' * 100}).", f"`{LONG}`"])
def test_tables_code_and_single_links_may_be_longer(text):
    assert not list(too_long(text))
