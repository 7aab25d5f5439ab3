"""Several questions about each of many items: what they cost, what was said, what stayed without a verdict."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from policy.judging.config import JudgeConfig
from policy.judging.endpoint import Judge, Question, Read, Unanswered, Verdict
from rlhf.core.errors import DataError

CACHE = "judge.jsonl"
"""What the judge has said, in the output folder."""
CHARACTERS_PER_TOKEN = 4
FAULTS_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What a judge said."""

    verdicts: Sequence[tuple[Verdict, ...] | None]
    """Those on the questions of each item; ``None`` for an item that is left out."""
    left_out: int
    notes: tuple[str, ...]


def ask_all(
    config: JudgeConfig, items: Sequence[Sequence[Question]], read: Read, folder: Path, console: Console, what: str
) -> Replies:
    """Ask a judge all questions about all items.

    Args:
        config: of the judge.
        items: the questions about each.
        read: of a reply; see :class:`policy.judging.endpoint.Judge`.
        folder: where the replies are kept as they come.
        console: is told what will be asked, and what that costs.
        what: the items in a word, in the plural.
    Raises:
        DataError: if more items stay without a verdict than ``judge.tolerated``; all replies are kept before that.
    """
    judge = Judge(config, folder / CACHE)
    questions = [question for item in items for question in item]
    missing = judge.unknown(questions, read)
    distinct = len({json.dumps(each) for each in questions})  # equal answers make equal questions
    console.print(cost(missing, config, known=distinct - len(missing)), highlight=False)
    found = iter(judge.ask(questions, read, _told_by(console, len(missing))))
    replies = [[next(found) for _ in item] for item in items]
    whole = [tuple(each for each in item if isinstance(each, Verdict)) for item in replies]
    verdicts = [given if len(given) == len(item) else None for given, item in zip(whole, replies, strict=True)]
    left_out = sum(each is None for each in verdicts)
    if not left_out:
        return Replies(verdicts=verdicts, left_out=0, notes=())
    faults = dict.fromkeys(each.fault for item in replies for each in item if isinstance(each, Unanswered))
    told = f"{left_out} of {len(items)} {what} have no verdict ({'; '.join([*faults][:FAULTS_TOLD])})"
    allowed = max(1, int(config.tolerated * len(items))) if config.tolerated else 0
    if left_out > allowed or left_out == len(items):
        again = f". What was answered is kept in {folder / CACHE}: the same command asks for the rest"
        kept = again if any(whole) else ""
        raise DataError(f"{config.url}: {told}, where {allowed} may stay without (judge.tolerated){kept}")
    return Replies(verdicts=verdicts, left_out=left_out, notes=(f"{told}: left out",))


def cost(missing: Sequence[Question], config: JudgeConfig, *, known: int) -> str:
    """What will be asked, in words."""
    read = sum(len(message["content"]) for each in missing for message in each) // CHARACTERS_PER_TOKEN
    told = f"{len(missing)} questions to the judge ({known} more are answered already): about {read:,} tokens to read"
    of_reading, of_writing = (price / 1e6 for price in config.prices or (0.0, 0.0))
    priced = config.prices is not None
    if config.max_tokens is None:
        return f"{told}: {read * of_reading:.2f} for these at these prices" if priced else told
    written = len(missing) * config.max_tokens
    told = f"{told}, at most {written:,} to write"
    least = read * of_reading
    return f"{told}: {least:.2f} to {least + written * of_writing:.2f} at these prices" if priced else told


def said(reply: str) -> str:
    """A reply without the thoughts before it.

    Raises:
        ValueError: if there are thoughts alone.
    """
    text = reply.rpartition("</think>")[2]
    if "<think>" in text:
        raise ValueError("thoughts without an end")
    return text


def _told_by(console: Console, total: int) -> Callable[[int], None]:
    def advance(count: int) -> None:
        if count == total or count % max(1, total // 20) == 0:
            console.print(f"{count} of {total} questions are through", highlight=False)

    return advance
