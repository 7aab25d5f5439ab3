"""Rows of a file, whatever their shape, as pairs, single answers or prompts; bad rows are refused.

Shapes of pairs, detected row by row:

* ``prompt text``: ``prompt``, ``chosen``, ``rejected`` are texts.
* ``prompt messages``: a prompt (messages or text), and answers given as text or as messages that follow it.
* ``conversations``: ``chosen`` and ``rejected`` are whole conversations; what they share is the prompt.
* ``human/assistant text``: whole conversations as one text with ``Human:`` and ``Assistant:`` turns
  (Anthropic HH), or such a text as prompt, ending in ``Assistant:``, with the answers beside it.

Single answers have the same shapes, with ``completion`` in place of ``chosen`` and ``rejected``; whole
conversations may also stand in ``messages``. Prompts alone are found in all of these.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.files import digest
from rlhf.data.options import ColumnConfig, ExampleColumns, PromptColumns

Message = Mapping[str, str]  # the keys role and content

PROMPT_TEXT = "prompt text"
PROMPT_MESSAGES = "prompt messages"
CONVERSATIONS = "conversations"
HUMAN_ASSISTANT = "human/assistant text"

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # valid in JSON as an escape, but no tokenizer takes it
_ROLES = {"Human": "user", "Assistant": "assistant"}
_USUAL_NAMES = {
    "prompt": ("prompt",),
    "response": ("response",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "chosen_score": ("chosen_score", "score_chosen"),
    "rejected_score": ("rejected_score", "score_rejected"),
    "messages": ("messages", "conversations"),
    "completion": ("completion", "response"),
    "label": ("label",),
}
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


class BadRow(Exception):
    """A row that cannot be used: ``reason`` is one of few, to be counted, ``detail`` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleRecord:
    """One conversation to learn from, or one answer and whether it is a desirable one."""

    row_id: str
    source: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]  # what follows the prompt: begins and ends with an assistant message
    label: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """What a model is to answer."""

    row_id: str
    source: str
    prompt: tuple[Message, ...]  # ends with a message from the user


def to_record(value: Any, columns: ColumnConfig, *, row_id: str, source: str) -> tuple[PreferenceRecord, str]:
    """The pair in one row, and the shape it had.

    Raises:
        BadRow: if the row is not a usable preference pair.
    """
    _refuse_other_than_columns(value)
    prompt, chosen, rejected, shape = _texts(value, columns)
    for name, messages in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _refuse_unusable(name, messages)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _refuse_other_end(name, messages)
    if _stripped(chosen) == _stripped(rejected):
        raise BadRow("identical pair", "chosen and rejected are the same")
    scores = [_number(value, columns, name) for name in ("chosen_score", "rejected_score")]
    if scores.count(None) == 1:
        raise BadRow("missing score", "only one of the two answers has a score")
    record = PreferenceRecord(
        row_id=row_id,
        source=source,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=_number(value, columns, "margin"),
        chosen_score=scores[0],
        rejected_score=scores[1],
    )
    return record, shape


def to_example(
    value: Any, columns: ExampleColumns, *, labeled: bool, row_id: str, source: str
) -> tuple[ExampleRecord, str]:
    """The conversation in one row, or its answer with a label, and the shape it had.

    Raises:
        BadRow: if the row is not usable as what is wanted.
    """
    _refuse_other_than_columns(value)
    messages = None if labeled else _cell(value, columns, "messages")
    if messages is not None:
        prompt, completion, shape = *_split_at_first_answer(messages), CONVERSATIONS
    elif not labeled and _cell(value, columns, "completion") is None:
        raise BadRow("missing column", f"neither messages nor completion is there; the row has: {_names(value)}")
    else:
        prompt, completion, shape = _prompt_and_answer(value, columns, "completion")
    for name, part in (("prompt", prompt), ("completion", completion)):
        _refuse_unusable(name, part)
    if completion[0]["role"] != "assistant":
        raise BadRow("no assistant answer", f"completion begins with a message from {completion[0]['role']!r}")
    _refuse_other_end("completion", completion)
    label = _truth(value, columns, "label") if labeled else None
    record = ExampleRecord(row_id=row_id, source=source, prompt=prompt, completion=completion, label=label)
    return record, shape


def to_prompt(value: Any, columns: PromptColumns, *, row_id: str, source: str) -> tuple[PromptRecord, str]:
    """The prompt in one row, and the shape the row had.

    Raises:
        BadRow: if there is no prompt that ends with a message from the user.
    """
    _refuse_other_than_columns(value)
    prompt, shape = _prompt_alone(value, columns)
    _refuse_unusable("prompt", prompt)
    if prompt[-1]["role"] != "user":
        raise BadRow("no prompt", f"the prompt ends with a message from {prompt[-1]['role']!r}, expected 'user'")
    return PromptRecord(row_id=row_id, source=source, prompt=prompt), shape


def to_conversations(
    value: Any, columns: ColumnConfig
) -> dict[str, tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """What there is to score in one row: prompt and answer of "response", or of "chosen" and "rejected".

    Raises:
        BadRow: if the row has neither, or what it has is not usable.
    """
    _refuse_other_than_columns(value)
    if _cell(value, columns, "response") is None:
        record, _ = to_record(value, columns, row_id="", source="")
        return {"chosen": (record.prompt, record.chosen), "rejected": (record.prompt, record.rejected)}
    prompt, response, _ = _prompt_and_answer(value, columns, "response")
    for name, messages in (("prompt", prompt), ("response", response)):
        _refuse_unusable(name, messages)
    return {"response": (prompt, response)}


def prompt_key(prompt: Sequence[Message]) -> int:
    """A 64-bit name for a prompt: rows with equal keys ask the same thing, up to white space."""
    parts = [part for message in prompt for part in (message["role"], " ".join(message["content"].split()))]
    return int(digest(*parts), 16)


# -------------------------------------------------------------------------------------------------- shapes

_Columns = ColumnConfig | ExampleColumns | PromptColumns
_Messages = tuple[Message, ...]
_Texts = tuple[_Messages, _Messages, _Messages, str]


def _texts(value: Mapping[str, Any], columns: ColumnConfig) -> _Texts:
    prompt = _cell(value, columns, "prompt")
    chosen, rejected = (_answer(value, columns, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong type", f"chosen is {_kind(chosen)}, rejected is {_kind(rejected)}")
    if isinstance(chosen, str):
        return _from_text(prompt, chosen, rejected)
    return _from_messages(prompt, _messages("chosen", chosen), _messages("rejected", rejected))


def _prompt_and_answer(value: Mapping[str, Any], columns: _Columns, name: str) -> tuple[_Messages, _Messages, str]:
    """Prompt and answer of a row with a single answer in the column ``name``, and the row's shape."""
    prompt, answer = _cell(value, columns, "prompt"), _answer(value, columns, name)
    messages = (_assistant(answer),) if isinstance(answer, str) else _messages(name, answer)
    if prompt is not None:
        before, shape = _prompt_messages(prompt)
        return before, messages, shape if isinstance(answer, str) else PROMPT_MESSAGES
    whole = _human_assistant_turns(answer) if isinstance(answer, str) else messages
    if len(whole) < 2 or whole[-1]["role"] != "assistant":
        raise BadRow("no prompt", f"no prompt column, and {name} is not a conversation that ends in an answer")
    return whole[:-1], whole[-1:], HUMAN_ASSISTANT if isinstance(answer, str) else CONVERSATIONS


def _split_at_first_answer(conversation: Any) -> tuple[_Messages, _Messages]:
    """What stands before the first assistant message, and from there to the last one: nobody answers the rest."""
    if not isinstance(conversation, list | tuple):
        raise BadRow("wrong type", f"messages is {_kind(conversation)}, expected a list of messages")
    messages = _messages("messages", conversation)
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no assistant answer", "messages has no message from 'assistant'")
    if answers[0] == 0:
        raise BadRow("no prompt", "messages begins with an assistant message")
    return messages[: answers[0]], messages[answers[0] : answers[-1] + 1]


def _prompt_alone(value: Mapping[str, Any], columns: PromptColumns) -> tuple[_Messages, str]:
    """The prompt in the first column that can have one, and the row's shape."""
    prompt, messages, chosen, rejected = (
        _cell(value, columns, name) for name in ("prompt", "messages", "chosen", "rejected")
    )
    if prompt is not None:
        return _prompt_messages(prompt)
    if messages is not None:
        return _up_to_last_user("messages", _conversation("messages", messages)), CONVERSATIONS
    if chosen is None:
        raise BadRow("missing column", f"none of prompt, messages and chosen is there; the row has: {_names(value)}")
    shape = HUMAN_ASSISTANT if isinstance(chosen, str) else CONVERSATIONS
    whole = _conversation("chosen", chosen)
    other = whole if rejected is None else _conversation("rejected", rejected)
    if _stripped(whole) == _stripped(other):
        return _up_to_last_user("chosen", whole), shape
    return _split_shared_prompt(whole, other)[0], shape


def _conversation(name: str, cell: Any) -> _Messages:
    if isinstance(cell, list | tuple):
        return _messages(name, cell)
    if not isinstance(cell, str):
        raise BadRow("wrong type", f"{name} is {_kind(cell)}, expected a list of messages")
    turns = _human_assistant_turns(cell)
    if not turns:
        raise BadRow("no prompt", f"there is no prompt column, and {name} is a plain text, not a conversation")
    return turns


def _up_to_last_user(name: str, messages: _Messages) -> _Messages:
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise BadRow("no prompt", f"{name} has no message from 'user'")
    return messages[: asked[-1] + 1]


def _from_text(prompt: Any, chosen: str, rejected: str) -> _Texts:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow("empty text", f"{name} is empty")
    whole = [_human_assistant_turns(text) for text in (chosen, rejected)]
    if whole[0] and whole[1]:
        return *_split_shared_prompt(*whole), HUMAN_ASSISTANT
    if prompt is None:
        raise BadRow("no prompt", "chosen and rejected are plain texts, and there is no prompt column")
    messages, shape = _prompt_messages(prompt)
    return messages, (_assistant(chosen),), (_assistant(rejected),), shape


def _from_messages(prompt: Any, chosen: _Messages, rejected: _Messages) -> _Texts:
    starts = {side[0]["role"] for side in (chosen, rejected) if side}
    if prompt is None or (starts and "assistant" not in starts):
        return *_split_shared_prompt(chosen, rejected), CONVERSATIONS
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side and side[0]["role"] != "assistant":
            raise BadRow("no assistant answer", f"{name} begins with a message from {side[0]['role']!r}")
    return _prompt_messages(prompt)[0], chosen, rejected, PROMPT_MESSAGES


def _prompt_messages(prompt: Any) -> tuple[_Messages, str]:
    if isinstance(prompt, str):
        turns = _human_assistant_turns(prompt)
        if len(turns) > 1 and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
            return turns[:-1], HUMAN_ASSISTANT
        return ({"role": "user", "content": prompt},), PROMPT_TEXT
    if not isinstance(prompt, list | tuple):
        raise BadRow("wrong type", f"prompt is {_kind(prompt)}, expected text or a list of messages")
    messages = _messages("prompt", prompt)
    if messages and messages[-1]["role"] == "assistant":
        raise BadRow("no prompt", "the prompt ends with an assistant message")
    return messages, PROMPT_MESSAGES


def _split_shared_prompt(chosen: _Messages, rejected: _Messages) -> tuple[_Messages, _Messages, _Messages]:
    """The longest shared prefix that an assistant message follows on both sides, and the remainders."""
    if chosen and _stripped(chosen) == _stripped(rejected):
        raise BadRow("identical pair", "chosen and rejected are the same conversation")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared > 0 and not _answers_begin(chosen, rejected, shared):
        shared -= 1
    if shared == 0:
        raise BadRow("no prompt", "chosen and rejected share no messages before their answers")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _answers_begin(chosen: _Messages, rejected: _Messages, at: int) -> bool:
    roles = {chosen[at]["role"], rejected[at]["role"]}
    return roles == {"assistant"} and chosen[at - 1]["role"] != "assistant"


def _human_assistant_turns(text: str) -> _Messages:
    """The turns of an Anthropic HH text; none if it does not begin with ``Human:``."""
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip() or pieces[1] != "Human":
        return ()
    return tuple(
        {"role": _ROLES[name], "content": content.strip()}
        for name, content in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


# --------------------------------------------------------------------------------------------------- cells


def _cell(value: Mapping[str, Any], columns: _Columns, name: str) -> Any:
    """What the column holds; ``None`` where it is null, absent under its usual names, or to be ignored."""
    wanted = getattr(columns, name)
    if wanted is None:
        return next((value[usual] for usual in _USUAL_NAMES[name] if value.get(usual) is not None), None)
    if wanted and wanted not in value:
        raise BadRow("missing column", f"{name} should be in {wanted!r}; the row has: {_names(value)}")
    return value[wanted] if wanted else None


def _answer(value: Mapping[str, Any], columns: _Columns, name: str) -> Any:
    cell = _cell(value, columns, name)
    if cell is None:
        raise BadRow("missing column", f"{name} is null or absent; the row has: {_names(value)}")
    if not isinstance(cell, str | list | tuple):
        raise BadRow("wrong type", f"{name} is {_kind(cell)}, expected text or a list of messages")
    return cell


def _messages(name: str, entries: Sequence[Any]) -> _Messages:
    messages = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise BadRow("wrong type", f"{name}[{place}] is {_kind(entry)}, expected role and content")
        message: dict[str, str] = {}
        for key in ("role", "content"):
            part = entry.get(key)
            if not isinstance(part, str):
                raise BadRow("wrong type", f"{name}[{place}].{key} is {_kind(part)}, expected text")
            message[key] = part
        messages.append(message)
    return tuple(messages)


def _refuse_other_than_columns(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"the row is {_kind(value)}, expected an object with columns")


def _refuse_other_end(name: str, messages: Sequence[Message]) -> None:
    if messages[-1]["role"] != "assistant":
        raise BadRow("no assistant answer", f"{name} ends with a message from {messages[-1]['role']!r}")


def _refuse_unusable(name: str, messages: Sequence[Message]) -> None:
    if not messages:
        raise BadRow("empty text", f"{name} has no messages")
    for place, message in enumerate(messages):
        if message["role"] != "system" and not message["content"].strip():
            raise BadRow("empty text", f"message {place + 1} of {name} ({message['role']}) is empty")
        if _HALF_CHARACTER.search(message["role"] + message["content"]):
            raise BadRow("broken text", f"message {place + 1} of {name} has half of a surrogate pair in it")


def _number(value: Mapping[str, Any], columns: _Columns, name: str) -> float | None:
    cell = _cell(value, columns, name)
    if isinstance(cell, str):  # a csv file has nothing but texts
        cell = _parsed(cell.strip(), name)
    if cell is None:
        return None
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        raise BadRow("wrong type", f"{name} is {_kind(cell)}, expected a number")
    number = float(cell) if abs(cell) < 1e300 else math.inf
    if not math.isfinite(number):
        raise BadRow("non-finite number", f"{name} is {cell}")
    return number


def _truth(value: Mapping[str, Any], columns: _Columns, name: str) -> bool:
    cell = _cell(value, columns, name)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise BadRow("missing label", f"{name} is null, empty or absent; the row has: {_names(value)}")
    if isinstance(cell, str) and cell.strip().lower() in _TRUTHS:  # a csv file has nothing but texts
        return _TRUTHS[cell.strip().lower()]
    if not isinstance(cell, bool | int | float) or cell not in (0, 1):
        found = f"the text {cell[:40]!r}" if isinstance(cell, str) else _kind(cell)
        raise BadRow("wrong type", f"{name} is {found}, expected true or false")
    return bool(cell)


def _parsed(text: str, name: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise BadRow("wrong type", f"{name} is the text {text[:40]!r}, expected a number") from None


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _kind(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"a number ({value})"
    names = {str: "text", list: "a list", dict: "an object", bool: "a truth value", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _names(value: Mapping[str, Any]) -> str:
    return ", ".join(map(str, value)) or "nothing"
