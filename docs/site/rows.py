"""The examples of the page on data, as files to download."""

import re

from links import ROOT

PAGE = "data.md"
_BLOCK = re.compile(r"^```jsonl (\w+)([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def files() -> dict[str, str]:
    """The rows of each block, by path."""
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    return {_name(number, block[1]): block[3] for number, block in enumerate(_BLOCK.finditer(text), start=1)}


def with_downloads(text: str) -> str:
    """The page, with a link below each block, and the settings that read it."""
    numbers = iter(range(1, 1000))

    def shown(block: re.Match[str]) -> str:
        name, settings = _name(next(numbers), block[1]), block[2].strip()
        check = f"rlhf data check {name.rpartition('/')[2]} --kind {block[1]} {settings}".strip()
        return f"```json\n{block[3]}```\n\n[Download]({name}){{ download }}, and look at it: `{check}`\n"

    return _BLOCK.sub(shown, text)


def _name(number: int, kind: str) -> str:
    return f"rows/{kind}-{number:02}.jsonl"
