"""Questions from files in the formats of benchmarks, and answers as these benchmarks read them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policy.answers.config import FORMATS
from rlhf.core.errors import DataError
from rlhf.data.messages import BadRow, Message, described
from rlhf.data.options import PromptColumns
from rlhf.data.records import to_prompt
from rlhf.data.rows import json_cell

CATEGORY_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""FastChat's ``temperature_config`` (fastchat/llm_judge/common.py); 0 is greedy."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a policy is to answer, in one turn or several."""

    place: str
    """File and line."""
    opening: tuple[Message, ...]
    """The conversation up to the first answer."""
    further: tuple[str, ...] = ()
    """What the user says after each answer."""
    row: Mapping[str, Any]
    """The row of the file; of a file of prompts, its other columns."""

    @property
    def temperature(self) -> float | None:
        """FastChat's for its category; ``None`` where there is none."""
        return CATEGORY_TEMPERATURES.get(str(self.row.get("category")))

    def asked(self, answers: Sequence[str]) -> tuple[Message, ...]:
        """The conversation behind so many answers, up to where the next one begins."""
        messages = list(self.opening)
        for answer, text in zip(answers, self.further, strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
        return tuple(messages)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One turn of a policy."""

    text: str
    tokens: int
    ended: bool
    """Whether the policy ended it, rather than the limit."""


Answers = Sequence[Sequence[Answer]]
"""Samples of one question, and the turns of each."""


def format_of(row: Mapping[str, Any]) -> str:
    """The format that the columns of a row tell."""
    turns = row.get("turns")
    if "question_id" in row and isinstance(turns, list) and turns:
        return "arena_hard" if isinstance(turns[0], Mapping) else "mt_bench"
    if "uid" in row and "prompt" in row:
        return "arena_hard"
    return "alpaca_eval" if "instruction" in row else "prompts"


def read_question(kind: str, row: Any, place: str) -> Question:
    """The question in a row of a file.

    Args:
        kind: one of :data:`policy.answers.config.FORMATS`.
        row: as it was read.
        place: file and line.
    Raises:
        DataError: if the row is not of that kind, naming what was expected.
    """
    try:
        if kind == "prompts":
            record, _ = to_prompt(row, PromptColumns(), row_id=place, source=place)
            return Question(place=place, opening=record.prompt, row=record.columns)
        if not isinstance(row, Mapping):
            raise BadRow("wrong type", f"the row is {described(row)}, expected an object with columns")
        first, *further = (_text(text) for text in _turns(kind, row))
    except BadRow as error:
        raise DataError(f"{place}: {error}; a file of {FORMATS[kind].partition(';')[0]}") from error
    return Question(place=place, opening=({"role": "user", "content": first},), further=tuple(further), row=row)


def _turns(kind: str, row: Mapping[str, Any]) -> Sequence[Any]:
    if kind == "alpaca_eval":
        return [row.get("instruction")]
    if "uid" in row and kind == "arena_hard":
        return [row.get("prompt")]
    turns = row.get("turns")
    if "question_id" not in row or not isinstance(turns, list) or not turns:
        raise BadRow("missing column", f"expected question_id and a list of turns; the row has {', '.join(row)}")
    return [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow("wrong type", f"a question is {described(value)}, expected a text")
    return value


def file_of(kind: str, name: str) -> str:
    """Where the answers go, below the output folder."""
    return {"alpaca_eval": "outputs.json", "prompts": "responses.jsonl"}.get(kind, f"model_answer/{name}.jsonl")


def written(kind: str, questions: Sequence[Question], answers: Sequence[Answers], name: str, seconds: float) -> str:
    """The text of the file of answers.

    Args:
        kind: one of :data:`policy.answers.config.FORMATS`.
        questions: N.
        answers: to each of them.
        name: of the policy.
        seconds: since 1970, for the formats that say when an answer was given.
    Raises:
        DataError: if there are several samples of a question, and the format has no place for them.
    """
    if kind in ("alpaca_eval", "arena_hard") and any(len(samples) > 1 for samples in answers):
        raise DataError(f"sampling.samples: {kind} has one answer to a question; set it to 1")
    pairs = list(zip(questions, answers, strict=True))
    if kind == "alpaca_eval":
        rows = [_alpaca_eval(question, samples[0], name) for question, samples in pairs]
        return json.dumps(rows, ensure_ascii=False, indent=1, default=json_cell) + "\n"
    if kind == "prompts":
        return _lines(row for question, samples in pairs for row in _plain(question, samples))
    write: Callable[[Question, Answers, str, float], dict[str, Any]] = _mt_bench
    if kind == "arena_hard":
        write = _arena_hard
    return _lines(write(question, samples, name, seconds) for question, samples in pairs)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=json_cell) + "\n" for row in rows)


def _alpaca_eval(question: Question, turns: Sequence[Answer], name: str) -> dict[str, Any]:
    known = {key: question.row[key] for key in ("dataset", "datasplit") if key in question.row}
    return {"instruction": question.row["instruction"], "output": turns[0].text, "generator": name, **known}


def _plain(question: Question, samples: Answers) -> list[dict[str, Any]]:
    lone = len(question.opening) == 1 and question.opening[0].keys() == {"role", "content"}
    prompt = question.opening[0]["content"] if lone else list(question.opening)
    return [
        {**question.row, "row": question.place, "sample": number, "prompt": prompt, "response": turns[0].text,
         "tokens": turns[0].tokens, "ended": turns[0].ended}
        for number, turns in enumerate(samples)
    ]  # fmt: skip


def _mt_bench(question: Question, samples: Answers, name: str, seconds: float) -> dict[str, Any]:
    choices = [{"index": number, "turns": [turn.text for turn in turns]} for number, turns in enumerate(samples)]
    return {
        "question_id": question.row["question_id"],
        "answer_id": _answer_id(question, samples, name),
        "model_id": name,
        "choices": choices,
        "tstamp": seconds,
    }


def _arena_hard(question: Question, samples: Answers, name: str, seconds: float) -> dict[str, Any]:
    (turns,) = samples
    if "uid" in question.row:
        (turn,) = turns
        return {
            "uid": question.row["uid"],
            "ans_id": _answer_id(question, samples, name),
            "model": name,
            "messages": [*question.opening, {"role": "assistant", "content": {"answer": turn.text}}],
            "tstamp": seconds,
            "metadata": {"token_len": turn.tokens},
        }
    told = [{"content": turn.text, "token_len": turn.tokens} for turn in turns]
    return _mt_bench(question, samples, name, seconds) | {"choices": [{"index": 0, "turns": told}]}


def _answer_id(question: Question, samples: Answers, name: str) -> str:
    """A name for an answer, as long as those that FastChat draws at random."""
    parts = [name, question.place, *(turn.text for turns in samples for turn in turns)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=11).hexdigest()
