"""Rows of a file, whatever their shape, as pairs, single answers or prompts; bad rows are refused."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.files import digest
from rlhf.data.messages import BadRow, Message, tools_of
from rlhf.data.options import ColumnConfig, ExampleColumns, PromptColumns
from rlhf.data.rows import RowReader
from rlhf.data.shapes import (
    CONVERSATIONS,
    Messages,
    pairs_in,
    prompt_alone,
    prompt_and_answer,
    refuse_other_end,
    refuse_unusable,
    split_at_first_answer,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceRecord:
    """One pair of answers to one prompt."""

    row_id: str  # file.jsonl:12, counted from 1
    source: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]  # what follows the prompt: begins and ends with an assistant message
    rejected: tuple[Message, ...]
    margin: float | None
    chosen_score: float | None
    rejected_score: float | None
    wrong: float | None = None
    """Probability that chosen is not the better one."""
    audited_pair: str = ""
    """The name, by :func:`rlhf.data.labels.pair_digest`, of the pair that this was said of; empty for this one."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know of the row."""
    unread: tuple[str, ...] = ()
    """Columns that hold something and were not read."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of its messages."""
        return (*self.prompt, *self.chosen, *self.rejected)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleRecord:
    """One conversation to learn from, or one answer and whether it is a desirable one."""

    row_id: str
    source: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]  # what follows the prompt: begins and ends with an assistant message
    label: bool | None
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of its messages."""
        return (*self.prompt, *self.completion)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """What a model is to answer."""

    row_id: str
    source: str
    prompt: tuple[Message, ...]  # ends with a message from the user
    columns: Mapping[str, Any]
    """What stands beside the prompt: the cells of all other columns, for reward functions."""
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of its messages."""
        return self.prompt


def to_records(value: Any, columns: ColumnConfig, *, row_id: str, source: str) -> tuple[list[PreferenceRecord], str]:
    """The pairs in one row, of one prompt, and the shape it had.

    Raises:
        BadRow: if the row is no usable preference pair, or prefers neither answer.
    """
    row = RowReader(value, columns)
    candidates, shape = pairs_in(row)
    for pair in candidates:
        pair.check()
    margin = row.number("margin")
    strength = abs(row.number("strength") or 0) or None
    row.word("group")  # of no use here, but no stray column: `rlhf score` writes it
    wrong = row.number("wrong")
    if wrong is not None and not 0 <= wrong <= 1:
        raise BadRow("wrong type", f"the probability that the label is wrong is {wrong:g}, expected one from 0 to 1")
    prompts = [row.with_context(pair.prompt) for pair in candidates]
    if any(len(side) > 1 for pair in candidates for side in (pair.chosen, pair.rejected)):
        row.note("note: answers of several messages count as a whole, with what others say in between")
    notes, unread = row.noticed()
    records = [
        PreferenceRecord(
            row_id=row_id,
            source=source,
            prompt=prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            margin=strength if margin is None else margin,
            chosen_score=pair.scores[0],
            rejected_score=pair.scores[1],
            wrong=wrong,
            audited_pair=row.word("audited_pair"),
            notes=notes,
            unread=unread,
        )
        for pair, prompt in zip(candidates, prompts, strict=True)
    ]
    return records, shape


def to_example(
    value: Any, columns: ExampleColumns, *, labeled: bool, row_id: str, source: str
) -> tuple[ExampleRecord, str]:
    """The conversation, or the answer with its label, in one row, and the shape the row had.

    Raises:
        BadRow: if the row has no usable conversation, or, where it is to have one, no label.
    """
    row = RowReader(value, columns)
    messages = None if labeled else row.cell("messages")
    shape: str
    if messages is not None:
        prompt, completion = split_at_first_answer(row, messages)
        shape = CONVERSATIONS
    elif not labeled and row.cell("completion") is None:
        raise row.missing(f"neither messages nor completion is there; the row has: {row.names()}")
    else:
        prompt, completion, shape = prompt_and_answer(row, "completion")
    for name, part in (("prompt", prompt), ("completion", completion)):
        refuse_unusable(name, part)
    if completion[0]["role"] != "assistant":
        raise BadRow("no assistant answer", f"completion begins with a message from {completion[0]['role']!r}")
    refuse_other_end("completion", completion)
    label = row.truth("label") if labeled else None
    prompt = row.with_context(prompt)
    notes, unread = row.noticed()
    record = ExampleRecord(
        row_id=row_id, source=source, prompt=prompt, completion=completion, label=label, notes=notes, unread=unread
    )
    return record, shape


def to_prompt(value: Any, columns: PromptColumns, *, row_id: str, source: str) -> tuple[PromptRecord, str]:
    """The prompt in one row, and the shape the row had.

    Raises:
        BadRow: if there is no prompt that ends with a message from the user.
    """
    row = RowReader(value, columns)
    prompt, shape = prompt_alone(row)
    refuse_unusable("prompt", prompt)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow("no prompt", f"the prompt ends with a message from {prompt[-1]['role']!r}, expected 'user'")
    prompt = row.with_context(prompt)
    notes, unread = row.noticed()
    record = PromptRecord(
        row_id=row_id, source=source, prompt=prompt, columns=row.others(), notes=notes, unread=unread
    )
    return record, shape


def to_conversations(
    value: Any, columns: ColumnConfig
) -> dict[str, list[tuple[tuple[Message, ...], tuple[Message, ...]]]]:
    """What there is to score in one row: prompt and answer of "response", or of every "chosen" and "rejected" answer.

    Raises:
        BadRow: if the row has neither, or what it has is not usable.
    """
    row = RowReader(value, columns)
    if row.cell("response") is None:
        records, _ = to_records(value, columns, row_id="", source="")
        found = {"chosen": [(pair.prompt, pair.chosen) for pair in records]}
        found["rejected"] = [(pair.prompt, pair.rejected) for pair in records]
        return {side: _distinct(answers) for side, answers in found.items()}
    prompt, response, _ = prompt_and_answer(row, "response")
    for name, messages in (("prompt", prompt), ("response", response)):
        refuse_unusable(name, messages)
    return {"response": [(row.with_context(prompt), response)]}


def prompt_key(prompt: Sequence[Message]) -> int:
    """A 64-bit name for a prompt: rows with equal keys ask the same thing, up to white space."""
    parts = [part for message in prompt for part in (message["role"], " ".join(message["content"].split()))]
    parts += [json.dumps(message["tool_calls"], sort_keys=True) for message in prompt if message.get("tool_calls")]
    parts += [json.dumps(tools, sort_keys=True) for tools in [tools_of(prompt)] if tools]
    return int(digest(*parts), 16)


def _distinct(answers: list[tuple[Messages, Messages]]) -> list[tuple[Messages, Messages]]:
    return [answer for place, answer in enumerate(answers) if answer not in answers[:place]]
