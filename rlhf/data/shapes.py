"""Shapes of rows: where the prompt and the answers stand.

Shapes of pairs, detected row by row:

* ``prompt text``: ``prompt``, ``chosen``, ``rejected`` are texts. An answer may also be a list of texts: then every
  chosen one makes a pair with every rejected one.
* ``prompt messages``: a prompt (messages or text), and answers given as text or as messages that follow it.
* ``conversations``: ``chosen`` and ``rejected`` are whole conversations; what they share is the prompt.
* ``human/assistant text``: whole conversations as one text with ``Human:`` and ``Assistant:`` turns
  (Anthropic HH), or such a text as prompt, ending in ``Assistant:``, with the answers beside it.
* ``rated answers``: a prompt and a list of answers with scores or ranks.

Single answers have the same shapes, with ``completion`` in place of ``chosen`` and ``rejected``; whole
conversations may also stand in ``messages``. Prompts alone are found in all of these.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.messages import BadRow, Message, called, described, human_assistant_turns
from rlhf.data.rows import RowReader

Messages = tuple[Message, ...]

PROMPT_TEXT = "prompt text"
PROMPT_MESSAGES = "prompt messages"
CONVERSATIONS = "conversations"
HUMAN_ASSISTANT = "human/assistant text"
RATED_ANSWERS = "rated answers"

TIE = "tie, left out"
"""The reason of rows that prefer neither answer; they are not bad."""

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # valid in JSON as an escape, but no tokenizer takes it
_ANSWER_TEXTS = ("response", "answer", "text", "content", "output", "completion")
_ANSWER_SCORES = ("overall_score", "score", "rating", "fine-grained_score")


_Scores = tuple[float | None, float | None]


@dataclass(frozen=True)
class Pair:
    """A candidate for a record."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    scores: _Scores = (None, None)

    def check(self) -> None:
        """Refuse pairs that nothing can be learned from.

        Raises:
            BadRow: if it cannot be used.
        """
        parts = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        for name, messages in parts.items():
            refuse_unusable(name, messages)
        for name in ("chosen", "rejected"):
            refuse_other_end(name, parts[name])
        if _stripped(self.chosen) == _stripped(self.rejected):
            raise BadRow("identical pair", "chosen and rejected are the same")
        if self.scores.count(None) == 1:
            raise BadRow("missing score", "only one of the two answers has a score")


def pairs_in(row: RowReader) -> tuple[list[Pair], str]:
    """Candidates for pairs in a row, of one prompt, and the shape that it has. Raises BadRow."""
    if row.cell("chosen") is None and isinstance(row.cell("answers"), list | tuple):
        return _rated_pairs(row), RATED_ANSWERS
    swapped = _second_is_better(row)
    cells = [row.answer("chosen"), row.answer("rejected")]
    scores = [row.numbers("chosen_score"), row.numbers("rejected_score")]
    if swapped:
        cells, scores = cells[::-1], scores[::-1]
    if not any(_is_texts(cell) for cell in cells):
        prompt, chosen, rejected, shape = _texts(row, *cells)
        return [Pair(prompt, chosen, rejected, (_only(scores[0]), _only(scores[1])))], shape
    sides = [_as_texts(name, cell) for name, cell in zip(("chosen", "rejected"), cells, strict=True)]
    spread = [_spread(given, len(side)) for given, side in zip(scores, sides, strict=True)]
    pairs, shape = [], PROMPT_TEXT
    for chosen_text, chosen_score in zip(sides[0], spread[0], strict=True):
        for rejected_text, rejected_score in zip(sides[1], spread[1], strict=True):
            prompt, chosen, rejected, shape = _texts(row, chosen_text, rejected_text)
            pairs.append(Pair(prompt, chosen, rejected, (chosen_score, rejected_score)))
    return pairs, shape


def _rated_pairs(row: RowReader) -> list[Pair]:
    """The best of the answers beside each one that is worse."""
    entries = row.cell("answers")
    rated = [_rated(f"answers[{place}]", entry) for place, entry in enumerate(entries)]
    best = max(rated, key=lambda answer: answer[1], default=None)
    worse = [answer for answer in rated if best and answer[1] < best[1]]
    if best is None or not worse:
        raise BadRow(TIE, f"none of the {len(rated)} answers is better than another one")
    if not row.has_prompt(()):
        raise row.missing("there are answers, but no prompt column", "no prompt")
    prompt, _ = _prompt_messages(row)
    ranked = any("rank" in entry for entry in entries)
    pairs = []
    for text, score in worse:
        scores = (None, None) if ranked else (best[1], score)
        pairs.append(Pair(prompt, (_assistant(best[0]),), (_assistant(text),), scores))
    differing = [pair for pair in pairs if _stripped(pair.chosen) != _stripped(pair.rejected)]
    if not differing:
        raise BadRow("identical pair", "all answers are the same text as the best one")
    return differing


def _rated(place: str, entry: Any) -> tuple[str, float]:
    """The text of an answer, and how good it is."""
    if not isinstance(entry, Mapping):
        raise BadRow("wrong type", f"{place} is {described(entry)}, expected an object with a text and a score or rank")
    text = next((entry[key] for key in _ANSWER_TEXTS if isinstance(entry.get(key), str)), None)
    if text is None:
        raise BadRow("missing column", f"{place} has no text ({', '.join(_ANSWER_TEXTS)}); it has: {', '.join(entry)}")
    rank = RowReader.as_number(entry.get("rank"), f"{place}.rank")
    if rank is not None:
        return text, -rank
    for key in _ANSWER_SCORES:
        score = RowReader.as_number(entry.get(key), f"{place}.{key}")
        if score is not None:
            return text, score
    raise BadRow("missing score", f"{place} has no rank or score ({', '.join(_ANSWER_SCORES)})")


def _second_is_better(row: RowReader) -> bool:
    """Whether the answer in the column of rejected is the preferred one."""
    strength = row.number("strength")
    if strength is not None:
        if strength == 0:
            raise BadRow(TIE, "the strength of the preference is 0")
        return strength > 0
    better = row.cell("better")
    if better is None:
        if row.column("better") or row.column("strength"):
            raise BadRow("missing column", "nothing says which of the two answers is the better one")
        return False
    word = str(better).strip().lower()
    first, second = ({str(row.column(name)).lower(), *words} for name, words in _SIDES.items())
    if word in first | second:
        return word in second
    if "tie" in word or word in ("-1", "-1.0", "both", "neither", "none", "same"):
        raise BadRow(TIE, f"the better answer is {better!r}")
    raise BadRow("wrong type", f"better is {better!r}, expected 0 or 1, a or b, or the name of a column")


_SIDES = {
    "chosen": ("0", "0.0", "false", "a", "model_a", "first", "chosen", "response_a"),
    "rejected": ("1", "1.0", "true", "b", "model_b", "second", "rejected", "response_b"),
}


def _is_texts(cell: Any) -> bool:
    return isinstance(cell, list | tuple) and bool(cell) and all(isinstance(part, str) for part in cell)


def _as_texts(name: str, cell: Any) -> list[str]:
    if isinstance(cell, str):
        return [cell]
    if not _is_texts(cell):
        raise BadRow("wrong type", f"{name} holds messages, but the other answer texts alone")
    return list(cell)


def _only(scores: list[float | None]) -> float | None:
    if len(scores) > 1:
        raise BadRow("wrong type", f"{len(scores)} scores for one answer")
    return scores[0]


def _spread(scores: list[float | None], count: int) -> list[float | None]:
    if len(scores) == 1:
        return scores * count
    if len(scores) != count:
        raise BadRow("missing score", f"{len(scores)} scores for {count} answers")
    return scores


def _texts(row: RowReader, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages, str]:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong type", f"chosen is {described(chosen)}, rejected is {described(rejected)}")
    if isinstance(chosen, str):
        return _from_text(row, chosen, rejected)
    return _from_messages(row, row.messages("chosen", chosen), row.messages("rejected", rejected))


def prompt_and_answer(row: RowReader, name: str) -> tuple[Messages, Messages, str]:
    """Prompt and answer of a row with a single answer in the column ``name``, and the row's shape."""
    answer = row.answer(name)
    messages = (_assistant(answer),) if isinstance(answer, str) else row.messages(name, answer)
    if row.has_prompt(messages):
        before, shape = _prompt_messages(row)
        return before, messages, shape if isinstance(answer, str) else PROMPT_MESSAGES
    whole = human_assistant_turns(answer) if isinstance(answer, str) else messages
    if len(whole) < 2 or whole[-1]["role"] != "assistant":
        raise row.missing(f"no prompt column, and {name} is not a conversation that ends in an answer", "no prompt")
    return whole[:-1], whole[-1:], HUMAN_ASSISTANT if isinstance(answer, str) else CONVERSATIONS


def split_at_first_answer(row: RowReader, conversation: Any) -> tuple[Messages, Messages]:
    """What stands before the first assistant message, and from there to the last one: nobody answers the rest."""
    if not isinstance(conversation, list | tuple):
        raise BadRow("wrong type", f"messages is {described(conversation)}, expected a list of messages")
    messages = row.messages("messages", conversation)
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no assistant answer", f"messages has no message from 'assistant', {_roles(messages)}")
    if answers[0] == 0:
        raise BadRow("no prompt", "messages begins with an assistant message")
    return messages[: answers[0]], messages[answers[0] : answers[-1] + 1]


def prompt_alone(row: RowReader) -> tuple[Messages, str]:
    """The prompt in the first column that can have one, and the row's shape."""
    prompt, messages, chosen, rejected = (row.cell(name) for name in ("prompt", "messages", "chosen", "rejected"))
    if prompt is not None:
        return _prompt_messages(row)
    if messages is not None:
        return _up_to_last_user("messages", _conversation(row, "messages", messages)), CONVERSATIONS
    if chosen is None:
        raise row.missing(f"none of prompt, messages and chosen is there; the row has: {row.names()}")
    shape = HUMAN_ASSISTANT if isinstance(chosen, str) else CONVERSATIONS
    whole = _conversation(row, "chosen", chosen)
    other = whole if rejected is None else _conversation(row, "rejected", rejected)
    if _stripped(whole) == _stripped(other):
        return _up_to_last_user("chosen", whole), shape
    return _split_shared_prompt(whole, other)[0], shape


def _conversation(row: RowReader, name: str, cell: Any) -> Messages:
    if isinstance(cell, list | tuple):
        return row.messages(name, cell)
    if not isinstance(cell, str):
        raise BadRow("wrong type", f"{name} is {described(cell)}, expected a list of messages")
    turns = human_assistant_turns(cell)
    if not turns:
        raise row.missing(f"there is no prompt column, and {name} is a plain text, not a conversation", "no prompt")
    return turns


def _up_to_last_user(name: str, messages: Messages) -> Messages:
    asked = [place for place, message in enumerate(messages) if message["role"] in ("user", "tool")]
    if not asked:
        raise BadRow("no prompt", f"{name} has no message from 'user', {_roles(messages)}")
    return messages[: asked[-1] + 1]


def _from_text(row: RowReader, chosen: str, rejected: str) -> tuple[Messages, Messages, Messages, str]:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow("empty text", f"{name} is empty")
    whole = [human_assistant_turns(text) for text in (chosen, rejected)]
    if whole[0] and whole[1]:
        row.cell("prompt")  # it is part of what they share
        return *_split_shared_prompt(*whole), HUMAN_ASSISTANT
    if not row.has_prompt((_assistant(chosen),)):
        raise row.missing("chosen and rejected are plain texts, and there is no prompt column", "no prompt")
    messages, shape = _prompt_messages(row)
    return messages, (_assistant(chosen),), (_assistant(rejected),), shape


def _from_messages(row: RowReader, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages, str]:
    starts = {side[0]["role"] for side in (chosen, rejected) if side}
    if not row.has_prompt(chosen) or (starts and "assistant" not in starts):
        row.cell("prompt")  # whole conversations have it
        return *_split_shared_prompt(chosen, rejected), CONVERSATIONS
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side and side[0]["role"] != "assistant":
            raise BadRow("no assistant answer", f"{name} begins with a message from {side[0]['role']!r}")
    return _prompt_messages(row)[0], chosen, rejected, PROMPT_MESSAGES


def _prompt_messages(row: RowReader) -> tuple[Messages, str]:
    prompt = row.prompt()
    if isinstance(prompt, str):
        turns = human_assistant_turns(prompt)
        if len(turns) > 1 and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
            return turns[:-1], HUMAN_ASSISTANT
        return ({"role": "user", "content": prompt},), PROMPT_TEXT
    if not isinstance(prompt, list | tuple):
        raise BadRow("wrong type", f"prompt is {described(prompt)}, expected text or a list of messages")
    messages = row.messages("prompt", prompt)
    if messages and messages[-1]["role"] == "assistant":
        raise BadRow("no prompt", "the prompt ends with an assistant message")
    return messages, PROMPT_MESSAGES


def _split_shared_prompt(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The longest shared prefix that an assistant message follows on both sides, and the remainders."""
    if chosen and _stripped(chosen) == _stripped(rejected):
        raise BadRow("identical pair", "chosen and rejected are the same conversation")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared > 0 and not _answers_begin(chosen, rejected, shared):
        shared -= 1
    if shared == 0:
        found = _roles([*chosen, *rejected])
        raise BadRow("no prompt", f"chosen and rejected share no messages before answers from 'assistant'; {found}")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _answers_begin(chosen: Messages, rejected: Messages, at: int) -> bool:
    roles = {chosen[at]["role"], rejected[at]["role"]}
    return roles == {"assistant"} and chosen[at - 1]["role"] != "assistant"


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _roles(messages: Sequence[Message]) -> str:
    return f"its roles are {', '.join(dict.fromkeys(repr(message['role']) for message in messages)) or 'none'}"


def refuse_other_end(name: str, messages: Sequence[Message]) -> None:
    if messages[-1]["role"] != "assistant":
        raise BadRow("no assistant answer", f"{name} ends with a message from {messages[-1]['role']!r}")


def refuse_unusable(name: str, messages: Sequence[Message]) -> None:
    if not messages:
        raise BadRow("empty text", f"{name} has no messages")
    for place, message in enumerate(messages):
        says_something = message["content"].strip() or message.get("tool_calls")
        if message["role"] not in ("system", "tool") and not says_something:
            raise BadRow("empty text", f"message {place + 1} of {name} ({message['role']}) is empty")
        if _HALF_CHARACTER.search("".join([message["role"], message["content"], *called(message)])):
            raise BadRow("broken text", f"message {place + 1} of {name} has half of a surrogate pair in it")


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str, str]]:
    """What tells conversations apart."""
    return [
        (
            message["role"],
            message["content"].strip(),
            "".join([message.get("reasoning_content", ""), json.dumps(message.get("tool_calls", ""))]),
        )
        for message in messages
    ]
