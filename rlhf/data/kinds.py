"""The kinds of rows that can be tokenized: preference pairs, conversations, answers with a label, and prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.labels import wrong_label
from rlhf.data.messages import Message
from rlhf.data.options import ColumnConfig, ExampleColumns, PromptColumns
from rlhf.data.records import ExampleRecord, PreferenceRecord, PromptRecord, to_example, to_prompt, to_records
from rlhf.data.rows import json_cell
from rlhf.data.spans import Span
from rlhf.data.store import EXAMPLE, PAIR, PROMPT, Fields, text_as_numbers
from rlhf.data.templates import Turns
from rlhf.data.tokenizing import Tokenizing


class Pairs:
    """Two answers to one prompt; each side is prompt and answer."""

    name = unit = check = "pairs"
    parts = ("prompt", "chosen", "rejected")
    record = PAIR

    def answers(self, entry: PreferenceRecord) -> tuple[Sequence[Message], ...]:
        return entry.chosen, entry.rejected

    def read(
        self, value: Any, columns: ColumnConfig, *, row_id: str, source: str
    ) -> tuple[list[PreferenceRecord], str]:
        return to_records(value, columns, row_id=row_id, source=source)

    def render(self, entry: PreferenceRecord, settings: Tokenizing) -> list[tuple[str, list[Span]]]:
        prompt = settings.shown_prompt(entry.prompt)
        sides = (settings.shown(side) for side in (entry.chosen, entry.rejected))
        return [settings.learned(*_to_the_end(*settings.format.render(prompt, side))) for side in sides]

    def fields(self, entry: PreferenceRecord, sides: list[Turns]) -> Fields:
        numbers = (entry.margin, entry.chosen_score, entry.rejected_score, wrong_label(entry))
        (chosen, chosen_spans), (rejected, rejected_spans) = sides
        starts = (chosen_spans[0, 0], rejected_spans[0, 0])
        return Fields((chosen, rejected), (starts, tuple(np.nan if n is None else n for n in numbers)))


@dataclass(frozen=True)
class Examples:
    """One conversation, in which only assistant turns behind the prompt are the model's; or, where ``labeled``,
    one answer, which is all that follows the prompt, as in a pair."""

    labeled: bool
    unit = "examples"
    parts = ("prompt", "completion")
    record = EXAMPLE

    def answers(self, entry: ExampleRecord) -> tuple[Sequence[Message], ...]:
        return (entry.completion,)

    @property
    def name(self) -> str:
        return "labeled answers" if self.labeled else "conversations"

    @property
    def check(self) -> str:
        return "labeled" if self.labeled else "conversations"

    def read(self, value: Any, columns: ExampleColumns, *, row_id: str, source: str) -> tuple[list[ExampleRecord], str]:
        record, shape = to_example(value, columns, labeled=self.labeled, row_id=row_id, source=source)
        return [record], shape

    def render(self, entry: ExampleRecord, settings: Tokenizing) -> list[tuple[str, list[Span]]]:
        prompt, completion = settings.shown_prompt(entry.prompt), settings.shown(entry.completion)
        if self.labeled:
            return [settings.learned(*_to_the_end(*settings.format.render(prompt, completion)))]
        return [settings.learned(*settings.format.render_turns([*prompt, *completion], first=len(prompt)))]

    def fields(self, entry: ExampleRecord, sides: list[Turns]) -> Fields:
        [(ids, spans)] = sides
        return Fields((ids, spans), (spans[0, 0], bool(entry.label)))


class Prompts:
    """What a model is to answer: tokens up to where it begins to write, the messages that they come from, and the row's
    other columns."""

    name = unit = check = "prompts"
    parts = ("prompt",)
    record = PROMPT

    def answers(self, entry: PromptRecord) -> tuple[Sequence[Message], ...]:
        return ()

    def read(self, value: Any, columns: PromptColumns, *, row_id: str, source: str) -> tuple[list[PromptRecord], str]:
        record, shape = to_prompt(value, columns, row_id=row_id, source=source)
        return [record], shape

    def render(self, entry: PromptRecord, settings: Tokenizing) -> list[tuple[str, list[Span]]]:
        text = settings.format.render_prompt(settings.shown_prompt(entry.prompt))
        return [(text, [(len(text), len(text))])]  # an empty response, so that all of the prompt may be cut

    def fields(self, entry: PromptRecord, sides: list[Turns]) -> Fields:
        [(ids, _)] = sides
        row = json.dumps([entry.prompt, entry.columns], separators=(",", ":"), default=json_cell)
        return Fields((ids, text_as_numbers(row)), ())


def _to_the_end(before: str, whole: str) -> tuple[str, list[Span]]:
    return whole, [(len(before), len(whole))]
