"""A comparison from two files of answers to a win rate."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from policy.judging.asking import ask_all
from policy.judging.config import JudgeConfig
from policy.win_rate.config import WinRateConfig
from policy.win_rate.questions import Pair, question, verdict
from policy.win_rate.rate import WinRate, win_rate
from reward.function import Answers, load_reward, served_cards
from rlhf.core.errors import DataError
from rlhf.core.files import write_json
from rlhf.core.findings import read_findings, write_findings
from rlhf.data.messages import Asked
from rlhf.data.plain_rows import plain_rows

KIND = "win_rate"
ANNOTATIONS = "annotations.json"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two files of answers, and names for whose they are."""

    pairs: Sequence[Pair]
    name: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Judgments:
    """What a judge says of pairs."""

    preferences: Sequence[float | None]
    """1 where the own answer is better, 0 where the other is, .5 for a tie; ``None`` for a pair that is left out."""
    details: Sequence[Mapping[str, Any]]
    """What else is known of each."""
    notes: tuple[str, ...] = ()
    served: Mapping[str, Any] = field(default_factory=dict)
    """See :func:`reward.function.served_cards`."""


Prefer = Callable[[Sequence[Pair]], Judgments]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out."""

    name: str
    reference: str
    judge: str
    questions: int
    left_out: int
    """Questions without a verdict; they count for nothing."""
    rate: WinRate
    notes: tuple[str, ...]


def compare(config: WinRateConfig, console: Console) -> Comparison:
    """Judge all pairs, and write evaluation.json, items.jsonl and annotations.json.

    Args:
        config: of the comparison.
        console: is told what an endpoint will be asked, and what that costs.
    Raises:
        DataError: if the files are of other shapes or of other questions, or the judge fails.
    """
    found = read_pairs(config.outputs, config.reference)
    if config.reward is not None:
        judge, prefer = config.reward, by_reward(config.reward)
    else:
        judge, prefer = str(config.judge.model), by_endpoint(config.judge, config.output, console)
    judged = prefer(found.pairs)
    kept = [(p, value) for p, value in zip(found.pairs, judged.preferences, strict=True) if value is not None]
    lengths = [[len(getattr(pair, side)) for pair, _ in kept] for side in ("own", "other")]
    result = Comparison(
        name=found.name,
        reference=found.reference,
        judge=judge,
        questions=len(found.pairs),
        left_out=len(found.pairs) - len(kept),
        rate=win_rate([value for _, value in kept], *lengths),
        notes=judged.notes,
    )
    items = [
        {"id": pair.id, "prompt": pair.prompt, "own": pair.own, "other": pair.other, "preference": value, **detail}
        for pair, value, detail in zip(found.pairs, judged.preferences, judged.details, strict=True)
    ]
    write_findings(config.output, KIND, {**asdict(result), **judged.served}, items)
    write_json(config.output / ANNOTATIONS, [_annotation(found, pair, value, judge) for pair, value in kept])
    return result


def _annotation(found: Pairs, pair: Pair, preference: float, judge: str) -> dict[str, Any]:
    """A row as AlpacaEval writes it: its preference is 1 for the first output, 2 for the second."""
    return {
        "instruction": pair.prompt,
        "output_1": pair.other,
        "generator_1": found.reference,
        "output_2": pair.own,
        "generator_2": found.name,
        "annotator": judge,
        "preference": 1 + preference,
    }


def read_pairs(outputs: Path, reference: Path) -> Pairs:
    """The answers of two files to the same questions, in the order of the first.

    Raises:
        DataError: naming what is missing, doubled or different.
    """
    (name, own), (other_name, other) = _read(outputs), _read(reference)
    if own.keys() != other.keys():
        lone = next(iter(own.keys() ^ other.keys()))
        raise DataError(
            f"{outputs} and {reference}: answers to other questions: {len(own.keys() - other.keys())} are in the first "
            f"alone, {len(other.keys() - own.keys())} in the second, such as {lone[:80]}"
        )
    pairs = [Pair(id=place, prompt=prompt, own=text, other=other[key][2]) for key, (place, prompt, text) in own.items()]
    return Pairs(pairs=pairs, name=name, reference=other_name)


def by_reward(spec: str) -> Prefer:
    """A judge that prefers the answer of higher reward; see :func:`reward.function.load_reward`."""
    reward = load_reward(spec)

    def prefer(pairs: Sequence[Pair]) -> Judgments:
        prompts = [pair.prompt for pair in pairs]
        judge = reward.reading(prompts, [{}] * len(pairs))
        sides = []
        for texts in ([pair.own for pair in pairs], [pair.other for pair in pairs]):
            given = judge(
                Answers(
                    prompts=prompts,
                    responses=texts,
                    token_ids=None,
                    ended=[True] * len(pairs),
                    columns=[{}] * len(pairs),
                )
            )
            sides.append(list(given))
        both = [(own, other) for own, other in zip(*sides, strict=True) if own is not None and other is not None]
        if len(both) < len(pairs) or any(value != value for side in both for value in side):
            raise DataError(f"{spec}: gave None or NaN for some answers; a judge needs a number for each")
        return Judgments(
            preferences=[0.5 if own == other else float(own > other) for own, other in both],
            details=[{"rewards": [float(own), float(other)]} for own, other in both],
            served=served_cards(judge=reward),
        )

    return prefer


def by_endpoint(config: JudgeConfig, folder: Path, console: Console) -> Prefer:
    """A judge behind an endpoint, which sees each pair in both orders.

    Args:
        config: where it is.
        folder: where its replies are kept.
        console: is told what will be asked, and what that costs.
    """

    def prefer(pairs: Sequence[Pair]) -> Judgments:
        items = [[question(pair, swapped=swapped) for swapped in (False, True)] for pair in pairs]
        replies = ask_all(config, items, verdict, folder, console, "pairs")
        preferences, details = [], []
        for given in replies.verdicts:
            preferences.append(None if given is None else (given[0].value + 1 - given[1].value) / 2)
            details.append({"replies": None if given is None else [each.text for each in given]})
        return Judgments(preferences=preferences, details=details, notes=replies.notes)

    return prefer


def read_comparison(folder: Path) -> Comparison:
    """What :func:`compare` wrote into ``folder``."""
    return TypeAdapter(Comparison).validate_python(read_findings(folder))


def report_of(folder: Path) -> Table:
    """The table of a win rate that is finished, from its run folder."""
    return win_rate_table(read_comparison(folder))


def win_rate_table(found: Comparison) -> Table:
    """The win rate, plain and at equal lengths."""
    counted = f"{found.questions - found.left_out} questions"
    table = Table(title=f"{found.name} against {found.reference}, {counted}", title_justify="left")
    for name in ("measure", "value", "uncertainty"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    rate = found.rate
    error = "" if rate.standard_error is None else f"standard error {rate.standard_error:.1%}"
    table.add_row("win rate", f"{rate.value:.1%}", error)
    controlled = rate.length_controlled
    if controlled is not None:
        table.add_row("length-controlled", f"{controlled.value:.1%}", f"{controlled.low:.1%} to {controlled.high:.1%}")
    table.add_row("won, lost, tied", f"{rate.wins}, {rate.losses}, {rate.ties}", "")
    return table


def _read(path: Path) -> tuple[str, dict[str, tuple[str, Asked, str]]]:
    """Whose answers a file has, and by question: where it stands, the question and the answer."""
    found: dict[str, tuple[str, Asked, str]] = {}
    names: set[str] = set()
    for place, row in plain_rows(path):
        cells: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
        prompt, text = cells.get("instruction", cells.get("prompt")), cells.get("output", cells.get("response"))
        if not isinstance(prompt, str | list) or not isinstance(text, str):
            raise DataError(f"{path}, {place}: expected instruction and output, or prompt and response")
        key = json.dumps(prompt, sort_keys=True)
        if key in found:
            raise DataError(f"{path}, {place}: a second answer to one question; compare one sample of each")
        found[key] = place, prompt, text
        names.add(str(cells.get("generator", path.parent.name)))
    if not found:
        raise DataError(f"{path}: there are no answers")
    return ", ".join(sorted(names)), found
