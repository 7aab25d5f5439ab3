"""The kinds of rows that can be tokenized: preference pairs, conversations, answers with a label, and prompts."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.options import ColumnConfig, ExampleColumns, PromptColumns
from rlhf.data.records import ExampleRecord, PreferenceRecord, PromptRecord, to_example, to_prompt, to_record
from rlhf.data.store import EXAMPLE, PAIR, PROMPT, Fields, text_as_numbers
from rlhf.data.templates import Span, Turns
from rlhf.data.tokenizing import Tokenizing


class Pairs:
    """Two answers to one prompt; each side is prompt and answer."""

    name = unit = "pairs"
    record = PAIR

    def read(self, value: Any, columns: ColumnConfig, *, row_id: str, source: str) -> tuple[PreferenceRecord, str]:
        return to_record(value, columns, row_id=row_id, source=source)

    def render(self, entry: PreferenceRecord, settings: Tokenizing) -> list[tuple[str, list[Span]]]:
        prompt = settings.with_system_prompt(entry.prompt)
        return [_to_the_end(*settings.format.render(prompt, side)) for side in (entry.chosen, entry.rejected)]

    def fields(self, entry: PreferenceRecord, sides: list[Turns]) -> Fields:
        numbers = (entry.margin, entry.chosen_score, entry.rejected_score)
        (chosen, chosen_spans), (rejected, rejected_spans) = sides
        starts = (chosen_spans[0, 0], rejected_spans[0, 0])
        return Fields((chosen, rejected), (starts, tuple(np.nan if n is None else n for n in numbers)))


@dataclass(frozen=True)
class Examples:
    """One conversation, in which only assistant turns behind the prompt are the model's; or, where ``labeled``,
    one answer, which is all that follows the prompt, as in a pair."""

    labeled: bool
    unit = "examples"
    record = EXAMPLE

    @property
    def name(self) -> str:
        return "labeled answers" if self.labeled else "conversations"

    def read(self, value: Any, columns: ExampleColumns, *, row_id: str, source: str) -> tuple[ExampleRecord, str]:
        return to_example(value, columns, labeled=self.labeled, row_id=row_id, source=source)

    def render(self, entry: ExampleRecord, settings: Tokenizing) -> list[tuple[str, list[Span]]]:
        prompt = settings.with_system_prompt(entry.prompt)
        if self.labeled:
            return [_to_the_end(*settings.format.render(prompt, entry.completion))]
        return [settings.format.render_turns([*prompt, *entry.completion], first=len(prompt))]

    def fields(self, entry: ExampleRecord, sides: list[Turns]) -> Fields:
        [(ids, spans)] = sides
        return Fields((ids, spans), (spans[0, 0], bool(entry.label)))


class Prompts:
    """What a model is to answer: tokens up to where it begins to write, and the messages that they come from."""

    name = unit = "prompts"
    record = PROMPT

    def read(self, value: Any, columns: PromptColumns, *, row_id: str, source: str) -> tuple[PromptRecord, str]:
        return to_prompt(value, columns, row_id=row_id, source=source)

    def render(self, entry: PromptRecord, settings: Tokenizing) -> list[tuple[str, list[Span]]]:
        text = settings.format.render_prompt(settings.with_system_prompt(entry.prompt))
        return [(text, [(len(text), len(text))])]  # an empty response, so that all of the prompt may be cut

    def fields(self, entry: PromptRecord, sides: list[Turns]) -> Fields:
        [(ids, _)] = sides
        messages = json.dumps(entry.prompt, ensure_ascii=False, separators=(",", ":"))
        return Fields((ids, text_as_numbers(messages)), ())


def _to_the_end(before: str, whole: str) -> tuple[str, list[Span]]:
    return whole, [(len(before), len(whole))]
