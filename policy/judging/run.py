"""A comparison from two files of answers to a win rate."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from policy.judging.endpoint import Endpoint, Judge
from policy.judging.win_rate import WinRate, win_rate
from reward.function import Answers, load_reward
from rlhf.core.errors import DataError
from rlhf.core.files import write_json
from rlhf.data.messages import Asked, as_messages
from rlhf.data.plain_rows import plain_rows

CHARACTERS_PER_TOKEN = 4
CACHE = "judge.jsonl"

_INSTRUCTIONS = (
    "You compare two answers to the last message of a conversation. Judge how well each does what was asked: whether "
    "it is right, helpful, honest and clear. Neither length nor the order of the answers is a merit. Reply with one "
    "word: A if the first answer is better, B if the second is, or TIE."
)
_VERDICT = re.compile(r"\b(?:A|B|(?i:TIE))\b")  # an "a" within a sentence is an article
_WORTH = {"A": 1.0, "B": 0.0, "TIE": 0.5}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What two models answered to one question."""

    prompt: Asked
    own: str
    other: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two files of answers, and names for whose they are."""

    pairs: Sequence[Pair]
    name: str
    reference: str


Prefer = Callable[[Sequence[Pair]], Sequence[float]]
"""What a judge says of pairs: 1 where the own answer is better, 0 where the other is, .5 for a tie."""


def compare(outputs: Path, reference: Path, prefer: Prefer, folder: Path) -> tuple[Comparison, WinRate]:
    """Judge all pairs, and write win_rate.json and annotations.json.

    Args:
        outputs: answers of a model: AlpacaEval's outputs.json, or responses.jsonl of ``rlhf generate``.
        reference: those of another model to the same questions.
        prefer: the judge.
        folder: to write into.
    Raises:
        DataError: if the files are of other shapes or of other questions, or the judge fails.
    """
    found = read_pairs(outputs, reference)
    preferences = prefer(found.pairs)
    lengths = [[len(each) for each in side] for side in zip(*((p.own, p.other) for p in found.pairs), strict=True)]
    result = win_rate(preferences, *lengths)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": pair.prompt, "output_1": pair.other, "output_2": pair.own, "preference": preference}
        for pair, preference in zip(found.pairs, preferences, strict=True)
    ]
    write_json(folder / "annotations.json", rows)
    write_json(folder / "win_rate.json", {"name": found.name, "reference": found.reference, **asdict(result)})
    return found, result


def read_pairs(outputs: Path, reference: Path) -> Comparison:
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
    pairs = [Pair(prompt=prompt, own=text, other=other[key][1]) for key, (prompt, text) in own.items()]
    return Comparison(pairs=pairs, name=name, reference=other_name)


def by_reward(spec: str) -> Prefer:
    """A judge that prefers the answer of higher reward; see :func:`reward.function.load_reward`."""
    reward = load_reward(spec)

    def prefer(pairs: Sequence[Pair]) -> list[float]:
        judge = reward.reading([pair.prompt for pair in pairs], [{}] * len(pairs))
        sides = []
        for texts in ([pair.own for pair in pairs], [pair.other for pair in pairs]):
            given = judge(
                Answers(
                    prompts=[pair.prompt for pair in pairs],
                    responses=texts,
                    token_ids=None,
                    ended=[True] * len(pairs),
                    columns=[{}] * len(pairs),
                )
            )
            sides.append(list(given))
        if any(value is None or value != value for side in sides for value in side):
            raise DataError(f"{spec}: gave None or NaN for some answers; a judge needs a number for each")
        return [0.5 if own == other else float(own > other) for own, other in zip(*sides, strict=True)]

    return prefer


def by_endpoint(endpoint: Endpoint, cache: Path, console: Console, prices: tuple[float, float] | None = None) -> Prefer:
    """A judge behind an endpoint, which sees each pair in both orders.

    Args:
        endpoint: where it is.
        cache: what it has said.
        console: is told what will be asked, and what that costs.
        prices: for a million tokens that it reads, and that it writes; ``None`` where nobody said.
    """
    judge = Judge(endpoint, cache)

    def prefer(pairs: Sequence[Pair]) -> list[float]:
        questions = [question(pair, swapped=swapped) for pair in pairs for swapped in (False, True)]
        missing = judge.unknown(questions)
        console.print(cost(missing, endpoint.max_tokens, prices, known=len(questions) - len(missing)), highlight=False)
        verdicts = judge.ask(questions, verdict, _told_by(console, len(missing)))
        return [(first + 1 - second) / 2 for first, second in zip(verdicts[::2], verdicts[1::2], strict=True)]

    return prefer


def question(pair: Pair, *, swapped: bool) -> list[dict[str, str]]:
    """What the judge is asked of a pair, whose own answer stands first unless ``swapped``."""
    talk = "\n\n".join(f"[{each['role']}]\n{each['content']}" for each in as_messages(pair.prompt))
    first, second = (pair.other, pair.own) if swapped else (pair.own, pair.other)
    asked = (
        f"# Conversation\n\n{talk}\n\n# Answer A\n\n{first}\n\n# Answer B\n\n{second}\n\n# Your verdict: A, B or TIE"
    )
    return [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": asked}]


def verdict(reply: str) -> float:
    """What the first answer is worth by a reply: 1, 0 or .5.

    Raises:
        ValueError: if the reply holds none of the three words, or several.
    """
    whole = reply.strip(" \n.*").upper()
    words = {whole} if whole in _WORTH else {each.upper() for each in _VERDICT.findall(reply)}
    if len(words) != 1:
        raise ValueError(f"a reply without one verdict: {reply[:60]!r}")
    return _WORTH[words.pop()]


def cost(missing: Sequence[Any], max_tokens: int, prices: tuple[float, float] | None, *, known: int) -> str:
    """What will be asked, in words."""
    read = sum(len(message["content"]) for each in missing for message in each) // CHARACTERS_PER_TOKEN
    written = len(missing) * max_tokens
    told = f"{len(missing)} questions to the judge ({known} are answered already): about {read:,} tokens to read, at "
    told += f"most {written:,} to write"
    if prices is None:
        return told
    return f"{told}: about {(read * prices[0] + written * prices[1]) / 1e6:.2f} at these prices"


def win_rate_table(found: Comparison, result: WinRate) -> Table:
    """The win rate, plain and at equal lengths."""
    table = Table(title=f"{found.name} against {found.reference}, {len(found.pairs)} questions", title_justify="left")
    for name in ("measure", "value", "uncertainty"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    error = "" if result.standard_error is None else f"standard error {result.standard_error:.1%}"
    table.add_row("win rate", f"{result.value:.1%}", error)
    controlled = result.length_controlled
    if controlled is not None:
        table.add_row("length-controlled", f"{controlled.value:.1%}", f"{controlled.low:.1%} to {controlled.high:.1%}")
    table.add_row("won, lost, tied", f"{result.wins}, {result.losses}, {result.ties}", "")
    return table


def _told_by(console: Console, total: int) -> Callable[[int], None]:
    def advance(count: int) -> None:
        if count == total or count % max(1, total // 20) == 0:
            console.print(f"judged {count} of {total}", highlight=False)

    return advance


def _read(path: Path) -> tuple[str, dict[str, tuple[Asked, str]]]:
    """Whose answers a file has, and by question: the question and the answer."""
    found: dict[str, tuple[Asked, str]] = {}
    names: set[str] = set()
    for place, row in plain_rows(path):
        cells: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
        prompt, text = cells.get("instruction", cells.get("prompt")), cells.get("output", cells.get("response"))
        if not isinstance(prompt, str | list) or not isinstance(text, str):
            raise DataError(f"{path}, {place}: expected instruction and output, or prompt and response")
        key = json.dumps(prompt, sort_keys=True)
        if key in found:
            raise DataError(f"{path}, {place}: a second answer to one question; compare one sample of each")
        found[key] = prompt, text
        names.add(str(cells.get("generator", path.parent.name)))
    if not found:
        raise DataError(f"{path}: there are no answers")
    return ", ".join(sorted(names)), found
