"""Items of reward-model benchmarks, from files in their published formats: a prompt with right and wrong answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.errors import DataError
from rlhf.data.messages import BadRow, Message, Notices, described, read_messages
from rlhf.data.options import ColumnConfig, SourceConfig
from rlhf.data.records import to_records
from rlhf.data.rows import RowReader
from rlhf.data.sources import Source, open_source, row_names

Messages = tuple[Message, ...]

SHOWN_FAULTS = 3
"""How many rows that cannot be used an error names."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkItem:
    """A prompt with answers to it, the right ones first."""

    id: str
    subset: str
    prompt: Messages
    answers: tuple[Messages, ...]
    right: int
    """How many answers are right."""
    annotated: tuple[float, ...] | None = None
    """Scores of an annotator for the answers, where all of them have one."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where a benchmark is to be had, and how its rows are read."""

    read: Callable[[Mapping[str, Any], ColumnConfig], BenchmarkItem | None]
    """An item of a row; ``None`` for a row that does not count. Raises BadRow."""
    of_pairs: bool = False
    """Plain pairs, whose columns may have any name, and which may be left out one by one."""
    hub: str | None = None
    """Name on the hub."""
    split: str | None = None
    """Its split there."""
    columns: tuple[str, ...] = ()
    """Columns that its rows have, for messages."""


def read_items(
    name: str, path: str | None, split: str | None, columns: ColumnConfig
) -> tuple[list[BenchmarkItem], str]:
    """All items of a benchmark, and what a reader of the report should know of rows that were left out.

    Args:
        name: of :data:`BENCHMARKS`.
        path: file, folder, pattern or hub name; ``None`` for where the benchmark is published.
        split: of a hub data set or a folder; ``None`` for the benchmark's own.
        columns: names of the columns of ``pairs`` and ``hh``.
    Raises:
        DataError: if the rows are not those of the benchmark, naming file and line. Plain pairs that cannot be used
            (identical, empty) are left out; a published benchmark counts with all of its rows or not at all.
    """
    benchmark = BENCHMARKS[name]
    where = path or benchmark.hub
    if where is None:
        raise DataError(f"benchmark = {name}: set data to a file with a prompt, chosen and rejected in each row")
    source = open_source(SourceConfig(path=where, split=split or (None if path else benchmark.split)))
    items, faults = _read_all(source, lambda row: benchmark.read(row, columns))
    if not items and not faults:
        raise DataError(f"{source.name}: there are no rows")
    shape = f"; a row of {name} has {', '.join(benchmark.columns)}" if benchmark.columns else ""
    if not items:
        raise DataError(f"{source.name}: none of {len(faults)} rows is one of {name}: {faults[0]}{shape}")
    if not faults:
        return items, ""
    shown = "\n".join(f"  {fault}" for fault in faults[:SHOWN_FAULTS])
    told = f"{source.name}: {len(faults)} of {len(items) + len(faults)} rows are not as {name} has them"
    if not benchmark.of_pairs:
        raise DataError(f"{told}, and its numbers are those of all rows:\n{shown}{shape}")
    return items, f"{told} and were left out:\n{shown}"


def _read_all(
    source: Source, read: Callable[[Mapping[str, Any]], BenchmarkItem | None]
) -> tuple[list[BenchmarkItem], list[str]]:
    """The items of a source, and where and why rows have none."""
    items: list[BenchmarkItem] = []
    faults: list[str] = []
    names = row_names(source.files)
    seen: set[str] = set()
    for row in source.rows():
        place = f"{names[source.files[row.file]]}:{row.line}"
        if row.fault is not None:
            faults.append(f"{place}: {row.fault}")
            continue
        if not isinstance(row.value, Mapping):
            faults.append(f"{place}: the row is {described(row.value)}, expected an object with columns")
            continue
        try:
            item = read(row.value)
        except BadRow as error:
            faults.append(f"{place}: {error}")
            continue
        if item is None:
            continue
        # Ids of some benchmarks are unique only within a subset, and a file of one's own may have none at all.
        identity = item.id or place
        if identity in seen:
            identity = f"{identity}@{place}"
        seen.add(identity)
        items.append(BenchmarkItem(**{**vars(item), "id": identity}))
    return items, faults


# Cells


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = f"{name} is {described(value)}" if name in row else f"there is no column {name!r}"
        raise BadRow("wrong shape", f"{found}; the row has: {', '.join(map(str, row))}")
    return value


def _word(row: Mapping[str, Any], name: str, default: str = "") -> str:
    value = row.get(name)
    return default if value is None else str(value)


def _messages(row: Mapping[str, Any], name: str, value: Any, role: str) -> Messages:
    """A text as one message of ``role``; or the messages of a list."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, list | tuple) and value:
        return read_messages(name, value, Notices())
    raise BadRow("wrong shape", f"{name} is {described(value)}, expected text or messages")


def _prompt(row: Mapping[str, Any], name: str = "prompt") -> Messages:
    return _messages(row, name, row.get(name), "user")


def _answers(row: Mapping[str, Any], name: str) -> list[Messages]:
    """Those in a list of texts, or the one of a single text."""
    value = row.get(name)
    if isinstance(value, str):
        return [_messages(row, name, value, "assistant")]
    if not isinstance(value, list | tuple) or not value:
        found = f"{name} is {described(value)}" if name in row else f"there is no column {name!r}"
        raise BadRow("wrong shape", f"{found}; expected text, or a list of texts")
    if all(isinstance(each, Mapping) for each in value):  # one conversation
        return [_messages(row, name, value, "assistant")]
    return [_messages(row, f"{name}[{place}]", each, "assistant") for place, each in enumerate(value)]


def _item(row: Mapping[str, Any], right: Sequence[Messages], wrong: Sequence[Messages], **named: str) -> BenchmarkItem:
    prompt = named.pop("prompt", "prompt")
    return BenchmarkItem(
        id=named.get("id", _word(row, "id")),
        subset=named.get("subset", _word(row, "subset", "all")),
        prompt=_prompt(row, prompt),
        answers=(*right, *wrong),
        right=len(right),
    )


def _check_counts(right: Sequence[Messages], wrong: Sequence[Messages], counts: tuple[int, int], told: str) -> None:
    if (len(right), len(wrong)) != counts:
        raise BadRow("wrong shape", f"{len(right)} chosen and {len(wrong)} rejected answers, expected {told}")


# Benchmarks


def _reward_bench(row: Mapping[str, Any], _: ColumnConfig) -> BenchmarkItem:
    _text(row, "subset")
    right, wrong = _answers(row, "chosen"), _answers(row, "rejected")
    _check_counts(right, wrong, (1, 1), "one of each")
    return _item(row, right, wrong)


def _reward_bench_2(row: Mapping[str, Any], _: ColumnConfig) -> BenchmarkItem:
    subset, identity = _text(row, "subset"), _word(row, "id")
    right, wrong = _answers(row, "chosen"), _answers(row, "rejected")
    if subset.lower() == "ties" and identity.partition(":")[0] not in ("ref", "tied"):
        raise BadRow("wrong shape", f"id = {identity!r} of the subset Ties: expected ref:NUMBER or tied:NUMBER")
    if subset.lower() != "ties":
        _check_counts(right, wrong, (1, 3), "1 and 3")
    return _item(row, right, wrong)


def _rm_bench(row: Mapping[str, Any], _: ColumnConfig) -> BenchmarkItem:
    right, wrong = _answers(row, "chosen"), _answers(row, "rejected")
    _check_counts(right, wrong, (3, 3), "3 styles of each")
    # The safety domain is published in two parts, which count as one.
    return _item(row, right, wrong, subset=_word(row, "domain", "all").partition("-")[0])


JUDGE_BENCH_CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


def _judge_bench(row: Mapping[str, Any], _: ColumnConfig) -> BenchmarkItem:
    label, source = _text(row, "label"), _text(row, "source")
    if label not in ("A>B", "B>A"):
        raise BadRow("wrong shape", f"label = {label!r}, expected A>B or B>A")
    first, second = _answers(row, "response_A"), _answers(row, "response_B")
    right, wrong = (first, second) if label == "A>B" else (second, first)
    category = next((name for start, name in JUDGE_BENCH_CATEGORIES.items() if source.startswith(start)), source)
    return _item(row, right, wrong, id=_word(row, "pair_id"), subset=category, prompt="question")


def _ppe(row: Mapping[str, Any], _: ColumnConfig) -> BenchmarkItem | None:
    """A pair that people have decided (ties do not count), or many answers with the truth of each."""
    numbered = {int(name[9:]): name for name in row if name[:9] == "response_" and name[9:].isdecimal()}
    responses = [numbered[number] for number in sorted(numbered)]
    if len(responses) < 2:
        raise BadRow("wrong shape", f"expected response_1, response_2, ...; the row has: {', '.join(map(str, row))}")
    answers = [_messages(row, name, row[name], "assistant") for name in responses]
    if "winner" in row:
        winner = _text(row, "winner")
        if winner.startswith("tie"):
            return None
        if winner not in ("model_a", "model_b"):
            raise BadRow("wrong shape", f"winner = {winner!r}, expected model_a, model_b or tie")
        right, wrong = (answers[:1], answers[1:]) if winner == "model_a" else (answers[1:], answers[:1])
        return _item(row, right, wrong, id=_word(row, "question_id"), subset="all")
    truths = row.get("scores")
    if not isinstance(truths, list | tuple) or len(truths) != len(answers):
        raise BadRow("wrong shape", f"expected winner, or scores with the truth of each of {len(answers)} answers")
    right = [answer for answer, true in zip(answers, truths, strict=True) if true]
    wrong = [answer for answer, true in zip(answers, truths, strict=True) if not true]
    return _item(row, right, wrong, id=_word(row, "question_id"), subset="all")


def _paired(row: Mapping[str, Any], columns: ColumnConfig) -> BenchmarkItem:
    """A row of pairs in any of the shapes that training reads; ``columns.group`` names its subset."""
    reader = RowReader(row, columns)
    if reader.cell("response") is not None:
        raise BadRow("wrong shape", "the row has one response, expected chosen and rejected")
    pairs, _ = to_records(row, columns, row_id="", source="")
    if any(pair.prompt != pairs[0].prompt for pair in pairs):
        raise BadRow("wrong shape", "chosen and rejected answer different prompts")
    right = _distinct((pair.chosen, pair.chosen_score) for pair in pairs)
    wrong = _distinct((pair.rejected, pair.rejected_score) for pair in pairs)
    scores = tuple(score for _, score in (*right, *wrong) if score is not None)
    return BenchmarkItem(
        id=_word(row, "id"),
        subset="all" if columns.group is None else reader.word("group"),
        prompt=pairs[0].prompt,
        answers=tuple(answer for answer, _ in (*right, *wrong)),
        right=len(right),
        annotated=scores if len(scores) == len(right) + len(wrong) else None,
    )


def _distinct(answers: Iterable[tuple[Messages, float | None]]) -> list[tuple[Messages, float | None]]:
    """Each answer once, with its score."""
    found: list[tuple[Messages, float | None]] = []
    for answer, score in answers:
        if all(answer != other for other, _ in found):
            found.append((answer, score))
    return found


BENCHMARKS = {
    "pairs": Benchmark(read=_paired, of_pairs=True),
    "hh": Benchmark(read=_paired, of_pairs=True, hub="Anthropic/hh-rlhf", split="test"),
    "rewardbench": Benchmark(
        read=_reward_bench,
        hub="allenai/reward-bench",
        split="filtered",
        columns=("prompt", "chosen", "rejected", "subset", "id"),
    ),
    "rewardbench2": Benchmark(
        read=_reward_bench_2,
        hub="allenai/reward-bench-2",
        split="test",
        columns=("prompt", "chosen", "rejected", "subset", "id"),
    ),
    "rm-bench": Benchmark(
        read=_rm_bench, hub="THU-KEG/RM-Bench", split="train", columns=("prompt", "chosen", "rejected", "domain", "id")
    ),
    "judgebench": Benchmark(
        read=_judge_bench,
        hub="ScalerLab/JudgeBench",
        split="gpt",
        columns=("question", "response_A", "response_B", "label", "source", "pair_id"),
    ),
    "ppe": Benchmark(
        read=_ppe,
        hub="lmarena-ai/PPE-Human-Preference-V1",
        split="test",
        columns=("prompt", "response_1", "response_2", "winner", "question_id"),
    ),
}
