"""One row of a file: its cells by the names that a recipe gives them, and what in it is not read."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rlhf.data.messages import BadRow, Message, Notices, described, holds, read_messages, read_tools, tools_of
from rlhf.data.options import ColumnConfig, Columns

_USUAL_NAMES = {
    "prompt": ("prompt",),
    "response": ("response",),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "answers": ("answers", "completions"),
    "margin": ("margin",),
    "chosen_score": (
        "chosen_score",
        "score_chosen",
        "chosen_rating",
        "rating_chosen",
        "chosen-rating",
        "chosen_avg_rating",
    ),
    "rejected_score": (
        "rejected_score",
        "score_rejected",
        "rejected_rating",
        "rating_rejected",
        "rejected-rating",
        "rejected_avg_rating",
    ),
    "wrong": ("audit_wrong",),
    "audited_pair": ("audit_pair",),
    "messages": ("messages", "conversations"),
    "completion": ("completion", "response"),
    "label": ("label",),
    "tools": ("tools", "functions"),
}
AUDIT_COLUMNS = (
    "audit_margin",
    "audit_margin_sd",
    "audit_wrong",
    "audit_weight",
    "audit_label",
    "audit_pair",
)
"""Columns that ``rlhf data audit`` adds: margin with its spread over repeats, probability that the label is wrong, one
minus that, the label that it suggests (as_given or swap), and :func:`rlhf.data.labels.pair_digest`."""
_CONVERSATIONS = ("conversations", "messages")
"""Where the prompt of a pair may stand whose answers are single messages."""

MISSING_COLUMN = "missing column"
"""The reason of rows that lack what they are read for, or have it under another name."""
_RATINGS = {"rating", "score", "stars"}
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}

_KNOWN_SHAPES = (
    ({"response_0", "response_1", "better_response_id"}, "PKU-SafeRLHF", "chosen=response_0 rejected=response_1 "
     "better=better_response_id"),
    ({"response1", "response2", "overall_preference"}, "HelpSteer3", "prompt=context chosen=response1 "
     "rejected=response2 strength=overall_preference"),
    ({"response_1", "response_2", "preference_strength"}, "HelpSteer2's preferences", "chosen=response_1 "
     "rejected=response_2 strength=preference_strength"),
    ({"conversation_a", "conversation_b", "winner"}, "Chatbot Arena", "chosen=conversation_a "
     "rejected=conversation_b better=winner"),
    ({"response_a", "response_b", "winner"}, "Chatbot Arena", "chosen=response_a rejected=response_b better=winner"),
    ({"instruction", "completions"}, "UltraFeedback", "prompt=instruction"),
    ({"instruction", "input", "output"}, "Alpaca", "prompt=instruction input=input completion=output"),
    ({"instruction", "output"}, "Alpaca", "prompt=instruction completion=output"),
    ({"question", "response_j", "response_k"}, "paired StackExchange", "prompt=question chosen=response_j "
     "rejected=response_k"),
    ({"question", "response", "system_prompt"}, "OpenOrca", "prompt=question completion=response "
     "system=system_prompt"),
    ({"question", "chosen", "rejected"}, "Orca's pairs", "prompt=question system=system"),
    ({"instruction", "chosen", "rejected"}, "Alpaca's pairs", "prompt=instruction input=input"),
    ({"instruction", "chosen_response"}, "UltraFeedback's pairs", "prompt=instruction"),
    ({"context", "question"}, "questions with a context", "prompt=question input=context"),
)
"""Columns that tell a known data set, its name, and the settings that read it."""


class RowReader:
    """Reads cells, and takes note of which ones were read."""

    def __init__(self, value: Any, columns: Columns) -> None:
        """Read from the row ``value``.

        Raises:
            BadRow: if ``value`` has no columns.
        """
        if not isinstance(value, Mapping):
            raise BadRow("wrong type", f"the row is {described(value)}, expected an object with columns")
        self.columns = columns
        self._value = value
        self._read: set[str] = set()
        self._notices = Notices()

    def column(self, name: str) -> str | None:
        """The column that ``name`` stands in; ``None`` if there is none."""
        wanted = getattr(self.columns, name, None)
        if wanted is None:
            return next((usual for usual in _USUAL_NAMES.get(name, ()) if self._value.get(usual) is not None), None)
        if wanted and wanted not in self._value:
            raise BadRow("missing column", f"{name} should be in {wanted!r}; the row has: {self.names()}")
        return wanted or None

    def cell(self, name: str) -> Any:
        """What the column holds; ``None`` where it is null, absent under its usual names, or to be ignored."""
        if getattr(self.columns, name, None) == "":
            self._read.update(_USUAL_NAMES.get(name, ()))
        column = self.column(name)
        if column is None:
            return None
        self._read.add(column)
        return self._value[column]

    def answer(self, name: str) -> Any:
        """Text, or a list of messages or texts. Raises BadRow."""
        cell = self.cell(name)
        if cell is None:
            raise self.missing(f"{name} is null or absent; the row has: {self.names()}")
        if isinstance(cell, Mapping):
            return [cell]
        if not isinstance(cell, str | list | tuple):
            raise BadRow("wrong type", f"{name} is {described(cell)}, expected text or a list of messages")
        return cell

    def messages(self, name: str, entries: Sequence[Any]) -> tuple[Message, ...]:
        """The messages of a list. Raises BadRow."""
        return read_messages(name, entries, self._notices)

    def has_prompt(self, answer: Sequence[Message]) -> bool:
        """Whether a prompt stands beside ``answer``."""
        return self._prompt_column(answer) is not None

    def prompt(self) -> Any:
        """The prompt as text or as a list, with the text that belongs to it."""
        column = self._prompt_column(())
        cell = None if column is None else self._value[column]
        self._read.add(column or "")
        more = self.cell("input")
        if more is None or (isinstance(more, str) and not more.strip()):
            return cell
        if not isinstance(cell, str) or not isinstance(more, str):
            raise BadRow("wrong type", f"prompt is {described(cell)} and input {described(more)}, expected two texts")
        return f"{cell}\n\n{more}"

    def with_context(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """The prompt with the tools and behind the system message of the row's own columns, where it has them."""
        tools = self.cell("tools")
        if holds(tools) and (offered := read_tools("tools", tools)):
            if tools_of(prompt):
                raise BadRow("wrong type", "there is a tools column, but the prompt has a message with tools already")
            prompt = ({**prompt[0], "tools": offered}, *prompt[1:])
        return self._with_system(prompt)

    def _with_system(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        text = self.cell("system")
        if text is None or (isinstance(text, str) and not text.strip()):
            return prompt
        if not isinstance(text, str):
            raise BadRow("wrong type", f"system is {described(text)}, expected text")
        if prompt[0]["role"] == "system":
            raise BadRow("wrong type", "there is a system column, but the prompt has a system message already")
        return ({"role": "system", "content": text}, *prompt)

    def number(self, name: str) -> float | None:
        return self.as_number(self.cell(name), name)

    def numbers(self, name: str) -> list[float | None]:
        """One number, or those of a list."""
        cell = self.cell(name)
        if isinstance(cell, list | tuple) and cell:
            return [self.as_number(part, f"{name}[{place}]") for place, part in enumerate(cell)]
        return [self.as_number(cell, name)]

    def word(self, name: str) -> str:
        """A text, or what else the cell holds as text; empty where it is null."""
        cell = self.cell(name)
        return "" if cell is None else str(cell)

    def truth(self, name: str) -> bool:
        cell = self.cell(name)
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            raise self.missing(f"{name} is null, empty or absent; the row has: {self.names()}", "missing label")
        if isinstance(cell, str) and cell.strip().lower() in _TRUTHS:  # a csv file has nothing but texts
            return _TRUTHS[cell.strip().lower()]
        if not isinstance(cell, bool | int | float) or cell not in (0, 1):
            found = f"the text {cell[:40]!r}" if isinstance(cell, str) else described(cell)
            raise BadRow("wrong type", f"{name} is {found}, expected true or false")
        return bool(cell)

    def names(self) -> str:
        return ", ".join(map(str, self._value)) or "nothing"

    def missing(self, detail: str, reason: str = MISSING_COLUMN) -> BadRow:
        """The fault, with the settings that read such rows where they are of a known kind."""
        known = next((entry for entry in _KNOWN_SHAPES if entry[0] <= self._value.keys()), None)
        if known is not None:
            pairs = (setting.split("=") for setting in known[2].split())
            unset = [(name, column) for name, column in pairs if getattr(self.columns, name, "") is None]
            asked = [f"data.columns.{name}={column}" for name, column in unset if column in self._value]
            if asked:
                return BadRow(reason, f"{detail}. These look like {known[1]}: set {' '.join(asked)}")
        if isinstance(self.columns, ColumnConfig) and {"messages", "conversations"} & self._value.keys():
            return BadRow(reason, f"{detail}. These look like conversations, as SFT reads them (--kind conversations)")
        if {"response", "helpfulness"} <= self._value.keys() and isinstance(self.columns, ColumnConfig):
            return BadRow(reason, f"{detail}. These look like HelpSteer2's ratings of single answers: its pairs are in "
                          "preference/preference.jsonl.gz")
        if _RATINGS & self._value.keys() and isinstance(self.columns, ColumnConfig):
            return BadRow(reason, f"{detail}. One rated answer a row makes no pair: put all answers to a prompt into "
                          'one row, as a list "answers" of {"text": ..., "rating": ...}')
        return BadRow(reason, detail)

    def note(self, text: str) -> None:
        """Add a sentence for the report."""
        self._notices.notes[text] = None

    def noticed(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Notes on the row; and the columns and keys that hold something but were not read."""
        read = {*self._read, *AUDIT_COLUMNS}  # of which those that are not read say nothing more
        columns = [str(name) for name, cell in self._value.items() if name not in read and holds(cell)]
        return tuple(self._notices.notes), (*columns, *self._notices.unread)

    def others(self) -> dict[str, Any]:
        """The columns that were not read, with what they hold, empty or not."""
        return {str(name): cell for name, cell in self._value.items() if name not in self._read}

    @staticmethod
    def as_number(cell: Any, name: str) -> float | None:
        """A number, or a text that is one; ``None`` for none. Raises BadRow."""
        if isinstance(cell, str):  # a csv file has nothing but texts
            cell = _parsed(cell.strip(), name)
        if cell is None:
            return None
        if isinstance(cell, bool) or not isinstance(cell, int | float | Decimal):
            raise BadRow("wrong type", f"{name} is {described(cell)}, expected a number")
        number = float(cell) if isinstance(cell, Decimal) or abs(cell) < 1e300 else math.inf
        if not math.isfinite(number):
            raise BadRow("non-finite number", f"{name} is {str(cell)[:40]}")
        return number

    def _prompt_column(self, answer: Sequence[Message]) -> str | None:
        """Where the prompt stands: its own column, or a conversation that an answer follows."""
        column = self.column("prompt")
        if column is not None and self._value[column] is not None:
            return column
        if getattr(self.columns, "prompt", None) is not None or (answer and answer[0]["role"] != "assistant"):
            return None
        return next((name for name in _CONVERSATIONS if isinstance(self._value.get(name), list | tuple)), None)


def json_cell(cell: Any) -> str | None:
    """What stands for a cell of a table that JSON has no word for: dates and decimal numbers as text, bytes (images)
    not at all. For ``json.dumps(default=...)``."""
    return None if isinstance(cell, bytes) else str(cell)


def _parsed(text: str, name: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise BadRow("wrong type", f"{name} is the text {text[:40]!r}, expected a number") from None
