"""Questions and answers from the files of benchmarks, brought together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.answers.formats import Question, read_question
from policy.grading.config import GradingConfig
from rlhf.core.errors import DataError
from rlhf.data.plain_rows import plain_rows

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge sees a reference answer, as in FastChat (NEED_REF_CATS)."""


@dataclass(frozen=True, kw_only=True)
class Graded:
    """A question with the answers of all models."""

    id: str
    category: str
    question: Question
    references: tuple[str, ...]
    """Right answers to its turns, as far as the judge is to see any."""
    answers: Mapping[str, tuple[str, ...]]
    """Turns by the name of the model."""


def read_graded(config: GradingConfig) -> list[Graded]:
    """The questions that were answered, in the order of the first file of answers.

    Raises:
        DataError: if a row is none, models have answered other questions, or a question is not known, or has no
            reference answer in a file of them.
    """
    known = _questions(config.questions) if config.questions is not None else {}
    questions: dict[str, Question] = {}
    answers: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, path in config.answers.items():
        own = answers[name] = {}
        for place, row in plain_rows(path):
            key, question, turns = _answer(row, f"{path}, {place}", known, config.questions)
            if key in own:
                raise DataError(f"{path}, {place}: a second answer to one question; grade one sample of each")
            own[key] = turns
            questions.setdefault(key, question)
        if not own:
            raise DataError(f"{path}: there are no answers")
    first = next(iter(answers))
    for name, own in answers.items():
        if own.keys() != answers[first].keys():
            lone = next(iter(own.keys() ^ answers[first].keys()))
            raise DataError(f"answers of {first} and {name}: to other questions, such as {lone[:80]}")
    references = _references(config.references) if config.references is not None else None
    graded = [_graded(key, questions[key], answers, references) for key in answers[first]]
    lacking = without_reference(graded)
    if config.references is not None and lacking:
        raise DataError(
            f"{config.references}: no reference answer to {len(lacking)} questions of {', '.join(WITH_REFERENCE)}, "
            f"such as {lacking[0].id[:80]} ({lacking[0].category}); expected their question_id in it"
        )
    return graded


def without_reference(graded: Sequence[Graded]) -> list[Graded]:
    """Those that the judge should see a reference answer to, and has none."""
    return [each for each in graded if each.category in WITH_REFERENCE and not each.references]


def _graded(
    key: str,
    question: Question,
    answers: Mapping[str, Mapping[str, tuple[str, ...]]],
    references: Mapping[str, tuple[str, ...]] | None,
) -> Graded:
    category = str(question.row.get("category", question.row.get("dataset", "")))
    known: tuple[str, ...] = ()
    if category in WITH_REFERENCE:
        column = question.row.get("reference")
        in_row = tuple(map(str, column)) if isinstance(column, list | tuple) else ()
        known = in_row if references is None else references.get(key, ())
    return Graded(
        id=key,
        category=category,
        question=question,
        references=known,
        answers={name: own[key] for name, own in answers.items()},
    )


def _questions(path: Path) -> dict[str, Question]:
    found = {}
    for place, row in plain_rows(path):
        question = read_question("mt_bench", row, place)
        found[str(question.row["question_id"])] = question
    return found


def _answer(
    row: Any, place: str, known: Mapping[str, Question], questions: Path | None
) -> tuple[str, Question, tuple[str, ...]]:
    """Name of the question, the question, and the turns of the answer."""
    cells: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    if "question_id" in cells and "choices" in cells:
        key = str(cells["question_id"])
        if key not in known:
            if questions is None:
                raise DataError(f"{place}: MT-Bench's answers do not hold their questions: give its question.jsonl too")
            raise DataError(f"{place}: question_id = {key}: no such question in {questions}")
        turns = _turns(cells["choices"], place)
        if len(turns) != 1 + len(known[key].further):
            raise DataError(f"{place}: {len(turns)} turns, where the question has {1 + len(known[key].further)}")
        return key, known[key], turns
    alpaca = "instruction" in cells
    text = cells.get("output" if alpaca else "response")
    if not isinstance(text, str):
        raise DataError(f"{place}: expected question_id and choices, instruction and output, or prompt and response")
    own = {name: cell for name, cell in cells.items() if name not in ("output", "response")}
    question = read_question("alpaca_eval" if alpaca else "prompts", own, place)
    return json.dumps(cells.get("instruction", cells.get("prompt")), ensure_ascii=False), question, (text,)


def _turns(choices: Any, place: str) -> tuple[str, ...]:
    """The turns of the one choice."""
    if not isinstance(choices, Sequence) or len(choices) != 1:
        count = len(choices) if isinstance(choices, Sequence) else "no list of"
        raise DataError(f"{place}: {count} choices; expected one answer to a question (rlhf generate --samples 1)")
    turns = choices[0].get("turns") if isinstance(choices[0], Mapping) else None
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{place}: expected choices[0].turns, a list of texts")
    return tuple(turns)


def _references(path: Path) -> dict[str, tuple[str, ...]]:
    found = {}
    for place, row in plain_rows(path):
        if not isinstance(row, Mapping) or "question_id" not in row or "choices" not in row:
            raise DataError(f"{path}, {place}: expected question_id and choices, as in FastChat's reference_answer")
        found[str(row["question_id"])] = _turns(row["choices"], f"{path}, {place}")
    return found
