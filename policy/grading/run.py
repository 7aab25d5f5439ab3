"""Grades from files of answers to a table."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from policy.grading.config import GradingConfig
from policy.grading.items import WITH_REFERENCE, Graded, read_graded, without_reference
from policy.grading.questions import BEST, grade, question
from policy.grading.radar import FEWEST, write_radar
from policy.grading.results import Grading, summarize
from policy.judging.asking import Replies, ask_all
from policy.judging.endpoint import Question, Verdict
from rlhf.core.errors import DataError
from rlhf.core.files import write_text
from rlhf.core.findings import write_findings

KIND = "grading"
Turn = tuple[str, Graded, int]
"""Model, question, turn."""


def grade_answers(config: GradingConfig, console: Console) -> Grading:
    """Have all answers graded, and write evaluation.json, items.jsonl, FastChat's judgments, and a radar plot.

    Args:
        config: of the grading.
        console: is told what the endpoint will be asked, and what that costs.
    Raises:
        DataError: if the files do not fit, or the judge fails.
    """
    graded = read_graded(config)
    turns = [
        (name, each, turn) for name in config.answers for each in graded for turn in range(len(each.answers[name]))
    ]
    asked = [_asked(*turn) for turn in turns]
    replies = ask_all(config.judge, [[each] for each in asked], grade, config.output, console, "answers")
    judge, grades = str(config.judge.model), _whole(config, turns, replies)
    for name, own in grades.items():
        if not own:
            raise DataError(f"{config.judge.url}: no question has grades for all answers of {name}")
    notes = (*replies.notes, *_without_reference(graded))
    found = summarize(judge, grades, {each.id: each.category for each in graded}, len(graded), notes)
    write_findings(config.output, KIND, asdict(found), _items(turns, replies))
    name = judge.replace("/", "_")
    write_text(config.output / "model_judgment" / f"{name}_single.jsonl", _judgments(turns, asked, replies, judge))
    if len(found.categories) >= FEWEST and all(each.by_category.keys() >= {*found.categories} for each in found.models):
        scores = {each.name: [each.by_category[name].value for name in found.categories] for each in found.models}
        write_radar(config.output / "radar.svg", found.categories, scores, best=BEST)
    return found


def _without_reference(graded: Sequence[Graded]) -> Iterator[str]:
    lacking = len(without_reference(graded))
    if lacking:
        yield (
            f"{lacking} questions of {', '.join(WITH_REFERENCE)} were graded without a reference answer (references = "
            "FastChat's reference_answer/MODEL.jsonl)"
        )


def _asked(name: str, each: Graded, turn: int) -> Question:
    *before, first = each.question.opening
    users = (str(first["content"]), *each.question.further)
    opening = "\n\n".join(f"### {message['role'].capitalize()}:\n{message['content']}" for message in before)
    pairs = [*zip(users, each.answers[name], strict=True)]
    return question(opening, pairs[: turn + 1], each.references)


def _whole(config: GradingConfig, turns: Sequence[Turn], replies: Replies) -> dict[str, dict[str, list[float]]]:
    """Grades by model and question, of questions whose turns all have one."""
    found: dict[str, dict[str, list[float | None]]] = {name: {} for name in config.answers}
    for (name, each, _), given in zip(turns, replies.verdicts, strict=True):
        found[name].setdefault(each.id, []).append(None if given is None else given[0].value)
    return {
        name: {key: [each for each in grades if each is not None] for key, grades in own.items() if None not in grades}
        for name, own in found.items()
    }


def _items(turns: Sequence[Turn], replies: Replies) -> Iterator[dict[str, Any]]:
    for (name, each, turn), given in zip(turns, replies.verdicts, strict=True):
        verdict = None if given is None else given[0]
        yield {
            "id": each.id,
            "turn": turn + 1,
            "category": each.category,
            "model": name,
            "grade": None if verdict is None else verdict.value,
            "reply": None if verdict is None else verdict.text,
        }


def _judgments(turns: Sequence[Turn], asked: Sequence[Question], replies: Replies, judge: str) -> str:
    """The judgments as FastChat's gen_judgment writes and its show_result reads them; -1 where there is no grade."""
    lines = []
    for (name, each, turn), question_, given in zip(turns, asked, replies.verdicts, strict=True):
        verdict: Verdict | None = None if given is None else given[0]
        kind = f"single{'-math' if each.references[: turn + 1] else ''}-v1{'-multi-turn' if turn else ''}"
        row = {
            "question_id": int(each.id) if each.id.isdecimal() else each.id,
            "model": name,
            "judge": [judge, kind],
            "user_prompt": question_[-1]["content"],
            "judgment": "" if verdict is None else verdict.text,
            "score": -1 if verdict is None else verdict.value,
            "turn": turn + 1,
            "tstamp": time.time(),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)
