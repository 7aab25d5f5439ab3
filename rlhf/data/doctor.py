"""What data looks like, and what is wrong with it, without a model in memory."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import numpy as np

from rlhf.core.files import digest
from rlhf.core.intervals import wilson_interval
from rlhf.data.kinds import Examples, Pairs, Prompts
from rlhf.data.markup import marks, markup_in
from rlhf.data.messages import BadRow, Message
from rlhf.data.options import ColumnConfig, Columns, RowSource
from rlhf.data.records import ExampleRecord, PreferenceRecord, PromptRecord, prompt_key
from rlhf.data.report import HIDDEN_QUESTION, NAME_COLUMNS, NOT_BAD, LeftOut, noticed
from rlhf.data.rows import MISSING_COLUMN
from rlhf.data.sources import Source, open_source, row_names
from rlhf.data.store import StoreCounts
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.data.tokenizing import RowKind, Tokenizing, parsed

CONTRADICTORY_LIMIT = 0.01
"""Share of contradictory pairs from which the data is called unfit."""
AGAINST_SCORES_LIMIT = 0.1
"""Share of the pairs with scores whose chosen answer has the lower one, from which the data is called unfit."""
KINDS: dict[str, RowKind] = {
    kind.check: kind for kind in (Pairs(), Examples(labeled=False), Prompts(), Examples(labeled=True))
}
"""What rows can be, by the names that ``rlhf data check`` takes."""

_FROM_COLUMNS = (
    ("pairs", ("chosen", "rejected", "chosen_response", "answers", "completions")),
    ("labeled", ("label",)),
    ("conversations", ("messages", "conversations", "completion", "response", "output")),
    ("prompts", ("prompt",)),
)
"""What rows are taken for that have one of these columns."""
_FROM_SETTINGS = (
    ("labeled", {"label"}),
    ("conversations", {"completion", "messages"}),
    ("pairs", {field.name for field in fields(ColumnConfig)} - {"prompt", "input", "system"}),
)
"""What rows are taken for if one of these is set among ``data.columns``."""
_CHUNK_ROWS = 256

Record = PreferenceRecord | ExampleRecord | PromptRecord


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """How to read and measure rows: in tokens where there is a tokenizer, else in characters."""

    columns: Columns
    chat: ChatFormat | None
    max_tokens: int
    kind: RowKind = KINDS["pairs"]
    system_prompt: str | None = None
    thoughts: str = "keep"

    @property
    def unit(self) -> str:
        return "tokens" if self.chat else "characters"

    def measure(self, records: Sequence[Any]) -> list[tuple[int, ...] | BadRow]:
        """Length of prompt and answers of each record, or what is against it."""
        if self.chat is None:
            return [_characters(record, self.kind) for record in records]
        settings = self._settings(self.chat)
        measured: list[tuple[int, ...] | BadRow] = []
        texts: list[tuple[str, list[tuple[int, int]]]] = []
        counts: list[int] = []
        for record in records:
            try:
                rendered = self.kind.render(record, settings)
            except TemplateFault as fault:
                measured.append(BadRow("template fault", str(fault)))
            except BadRow as fault:
                measured.append(fault)
            else:
                measured.append(())
                counts.append(len(rendered))
                texts += rendered
        sizes = iter([(int(spans[0, 0]), len(ids)) for ids, spans in self.chat.tokenize_turns(texts)])
        sides = iter([list(islice(sizes, count)) for count in counts])
        for place, entry in enumerate(measured):
            if not isinstance(entry, BadRow):
                found = next(sides)
                answers = [whole - start for start, whole in found] if len(self.kind.parts) > 1 else []
                measured[place] = (found[0][0], *answers)
        return measured

    def noteworthy(self, record: Any) -> tuple[str, ...]:
        """What a reader should know of a record beside what its reader says."""
        if self.chat is None:
            return markup_in(record.messages, marks(()))
        return (*self.chat.markup(record.messages), *self._settings(self.chat).thoughts_note(record))

    def _settings(self, chat: ChatFormat) -> Tokenizing:
        return Tokenizing(
            kind=self.kind,
            format=chat,
            columns=self.columns,
            system_prompt=self.system_prompt,
            thoughts=self.thoughts,
            max_tokens=self.max_tokens,
            over_length="drop",
        )


@dataclass(kw_only=True)
class Examination:
    """What was found in one group of sources (training or eval)."""

    unit: str
    kind: RowKind = KINDS["pairs"]
    names: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    bad: list[LeftOut] = field(default_factory=list)  # once for each reason, however many items a row makes
    lengths: list[tuple[int, ...]] = field(default_factory=list)  # of the kind's parts of each item
    prompts: Counter[int] = field(default_factory=Counter)
    pairs: dict[tuple[int, str, str], list[str]] = field(
        default_factory=dict
    )  # prompt, chosen, rejected: row ids; of labeled answers, the answer and nothing, or nothing and the answer
    left_out: int = 0  # ties and the like, which are not bad
    desirable: int = 0
    with_margin: int = 0
    with_scores: int = 0
    against_scores: list[str] = field(default_factory=list)  # rows whose chosen answer has the lower score
    cut: int = 0  # pairs longer than the limit
    too_long: int = 0  # of these, pairs with a response that alone is longer
    _bad_keys: set[tuple[str, int, str]] = field(default_factory=set)

    @property
    def usable(self) -> int:
        return len(self.lengths)

    def duplicates(self) -> list[list[str]]:
        """Row ids of pairs that occur more than once, group by group."""
        return [rows for rows in self.pairs.values() if len(rows) > 1]

    def contradictions(self) -> list[tuple[list[str], list[str]]]:
        """Row ids of pairs that stand both ways round: those one way and those the other."""
        both = ((key, (key[0], key[2], key[1])) for key in self.pairs if key[1] < key[2])
        return [(self.pairs[one], self.pairs[other]) for one, other in both if other in self.pairs]

    def contradictory_share(self) -> float:
        rows = sum(len(one) + len(other) for one, other in self.contradictions())
        return rows / max(self.usable, 1)

    def against_scores_share(self) -> float:
        return len(self.against_scores) / max(self.with_scores, 1)

    def add_bad(self, row: LeftOut) -> None:
        key = (row.file, row.line, row.reason)
        if key not in self._bad_keys:
            self._bad_keys.add(key)
            self.bad.append(row)

    @property
    def bad_rows(self) -> int:
        return len({(row.file, row.line) for row in self.bad})

    def bad_share(self) -> float:
        return self.bad_rows / max(self.rows, 1)

    def longer_wins(self) -> tuple[int, int]:
        """Pairs whose chosen answer is the longer one, and pairs whose answers differ in length."""
        differing = [(sizes[1], sizes[2]) for sizes in self.lengths if sizes[1] != sizes[2]]
        return sum(chosen > rejected for chosen, rejected in differing), len(differing)

    def quantiles(self) -> dict[str, list[int]]:
        """Median, 95 % and 99 % quantile and maximum of the length of each part."""
        table = np.array(self.lengths or [(0,) * len(self.kind.parts)])
        values = np.percentile(table, [50, 95, 99, 100], axis=0, method="higher").T
        return dict(zip(self.kind.parts, values.astype(int).tolist(), strict=True))

    def counts(self) -> dict[str, int]:
        """How many rows there are, of which kinds."""
        found = {"rows": self.rows, "bad": self.bad_rows, self.kind.unit: self.usable}
        if self.kind.unit != "prompts":
            found["prompts"] = len(self.prompts)
        if self.left_out:
            found["ties"] = self.left_out
        if self.kind.check == "pairs":
            found |= {"with scores": self.with_scores, "with margin": self.with_margin}
        if self.kind.check == "labeled":
            found["desirable"] = self.desirable
        return found

    def checks(self, max_tokens: int | None) -> dict[str, str]:
        """What may be wrong, and how often; ``max_tokens``: the limit of a row, if rows were measured in tokens."""
        unit = self.kind.unit
        found = {f"{unit} that repeat an earlier one": str(sum(len(rows) - 1 for rows in self.duplicates()))}
        if self.kind.check == "labeled":
            found["answers with both labels"] = str(len(self.contradictions()))
        if self.kind.check == "pairs":
            wins, differing = self.longer_wins()
            low, high = wilson_interval(wins, differing)
            found |= {
                "pairs that stand both ways round": str(len(self.contradictions())),
                "chosen has the lower score": str(len(self.against_scores)),
                "the longer answer wins": f"{wins / max(differing, 1):.1%} ({low:.1%}-{high:.1%})",
            }
        if max_tokens is not None:
            found[f"longer than {max_tokens} tokens"] = f"{self.cut} ({self.cut / max(self.usable, 1):.1%})"
            if unit != "prompts":
                found["of these, by the response alone"] = str(self.too_long)
        return found

    def examples(self) -> dict[str, list[str]]:
        """Row ids of what is noteworthy, by what it is."""
        repeated = [" = ".join(rows[:2]) for rows in self.duplicates()]
        contradictory = [f"{one[0]} against {other[0]}" for one, other in self.contradictions()]
        found = {"repeated": repeated, "both ways round": contradictory, "lower score": self.against_scores}
        return {name: rows for name, rows in found.items() if rows}


def guessed_kind(paths: Sequence[str], split: str | None, columns: Collection[str]) -> str:
    """One of :data:`KINDS`: what the ``columns`` that are set belong to, else what the first row looks like."""
    of_columns = next((kind for kind, names in _FROM_SETTINGS if not names.isdisjoint(columns)), None)
    if of_columns is not None:
        return of_columns
    rows = (row for path in paths for row in open_source(RowSource(path=path, split=split)).rows())
    first = next((row.value for row in rows if isinstance(row.value, dict)), {})
    return next((kind for kind, names in _FROM_COLUMNS if any(first.get(name) is not None for name in names)), "pairs")


def examine(entries: Sequence[RowSource], ruler: Ruler) -> Examination:
    """Read all rows of ``entries``.

    Raises:
        DataError: if a source cannot be read at all.
    """
    sources = [open_source(entry) for entry in entries]
    names = row_names([file for source in sources for file in source.files])
    found = Examination(unit=ruler.unit, kind=ruler.kind, names=[source.name for source in sources])
    for entry, source in zip(entries, sources, strict=True):
        counts = StoreCounts()
        own = getattr(entry, "columns", None)
        records = _usable_records(source, replace(ruler, columns=own or ruler.columns), names, found, counts)
        while chunk := list(islice(records, _CHUNK_ROWS)):
            for (record, place), sizes in zip(chunk, ruler.measure([r for r, _ in chunk]), strict=True):
                if isinstance(sizes, BadRow):
                    found.add_bad(_left_out(place, record.row_id, sizes.reason, sizes.detail))
                else:
                    _add(found, record, sizes, ruler)
        found.notices += [*source.notices, *noticed(counts, [names[file] for file in source.files], found.kind.unit)]
    if len(found.prompts) == 1 and found.usable > 1:
        found.notices.append(f"warning: all {found.usable} {found.kind.unit} have the same prompt; {HIDDEN_QUESTION}")
    return found


def shared_prompts(train: Examination, evals: Examination) -> tuple[int, int]:
    """Prompts that both have, and the number of eval items that ask one of them."""
    shared = train.prompts.keys() & evals.prompts.keys()
    return len(shared), sum(evals.prompts[key] for key in shared)


def serious_faults(train: Examination, evals: Examination | None, max_bad_share: float) -> list[str]:
    """Reasons not to train on this data as it is; none if it may do."""
    faults = []
    for role, found in (("train", train), ("eval", evals)):
        if found is None:
            continue
        if not found.usable:
            hint = f". {NAME_COLUMNS}" if MISSING_COLUMN in reasons(found.bad) else ""
            faults.append(f"{role}: there is no usable {found.kind.unit.removesuffix('s')}{hint}")
        elif found.bad_share() > max_bad_share:
            faults.append(f"{role}: {found.bad_share():.1%} of the rows are bad, allowed are {max_bad_share:.1%}")
        if found.contradictory_share() > CONTRADICTORY_LIMIT:
            faults.append(f"{role}: {found.contradictory_share():.1%} of the {found.kind.unit} contradict each other")
        if found.against_scores_share() > AGAINST_SCORES_LIMIT:
            faults.append(
                f"{role}: in {found.against_scores_share():.1%} of the pairs with scores, chosen has the lower one: "
                'are columns swapped? (data.columns.chosen_score="" and the same for rejected ignore scores)'
            )
    if evals and shared_prompts(train, evals)[0]:
        prompts, pairs = shared_prompts(train, evals)
        faults.append(
            f"{prompts} eval prompts ({pairs} of {evals.usable} eval {evals.kind.unit}) are also in the training data"
        )
    return faults


def reasons(bad: Sequence[LeftOut]) -> dict[str, list[LeftOut]]:
    """Bad rows by reason, the most frequent reason first."""
    groups: dict[str, list[LeftOut]] = {}
    for row in bad:
        groups.setdefault(row.reason, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _usable_records(
    source: Source, ruler: Ruler, names: dict[str, str], found: Examination, counts: StoreCounts
) -> Iterator[tuple[Record, tuple[str, int]]]:
    for row in source.rows():
        found.rows += 1
        place = (source.files[row.file], row.line)
        row_id = f"{names[place[0]]}:{row.line}"
        try:
            records, shape = ruler.kind.read(parsed(row), ruler.columns, row_id=row_id, source=source.name)
        except BadRow as fault:
            if fault.reason in NOT_BAD:
                found.left_out += 1
            else:
                found.add_bad(_left_out(place, row_id, fault.reason, fault.detail))
            continue
        found.shapes[shape] += 1
        for note in dict.fromkeys((*records[0].notes, *(note for each in records for note in ruler.noteworthy(each)))):
            counts.notice(note, (row.file, row.line))
        for column in records[0].unread:
            counts.unread[column] = counts.unread.get(column, 0) + 1
        for record in records:
            yield record, place


def _left_out(place: tuple[str, int], row_id: str, reason: str, detail: str) -> LeftOut:
    return LeftOut(file=place[0], line=place[1], row_id=row_id, reason=reason, detail=detail)


def _add(found: Examination, record: Any, sizes: tuple[int, ...], ruler: Ruler) -> None:
    key = prompt_key(record.prompt)
    sides = [_digest(side) for side in ruler.kind.answers(record)]
    found.prompts[key] += 1
    found.lengths.append(sizes)
    label = getattr(record, "label", None)
    first, second = [*sides, "", ""][:2]
    found.pairs.setdefault((key, second, first) if label is False else (key, first, second), []).append(record.row_id)
    found.desirable += label is True
    if isinstance(record, PreferenceRecord):
        found.with_margin += record.margin is not None
        if record.chosen_score is not None and record.rejected_score is not None:
            found.with_scores += 1
            if record.chosen_score < record.rejected_score:
                found.against_scores.append(record.row_id)
    if ruler.chat:
        response = max(sizes[1:], default=0)
        found.cut += sizes[0] + response > ruler.max_tokens
        found.too_long += response > ruler.max_tokens


def _digest(messages: Sequence[Message]) -> str:
    return digest(*(message["content"].strip() for message in messages))


def _characters(record: Any, kind: RowKind) -> tuple[int, ...]:
    sides = (record.prompt, *kind.answers(record))
    return tuple(sum(len(message["content"]) for message in side) for side in sides)
