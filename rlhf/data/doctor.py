"""What preference data looks like, and what is wrong with it, without a model in memory."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from rlhf.core.files import digest
from rlhf.data.options import ColumnConfig, SourceConfig
from rlhf.data.records import BadRow, PreferenceRecord, prompt_key, to_record
from rlhf.data.report import LeftOut
from rlhf.data.sources import Source, open_source, row_names
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.data.tokenizing import parsed

CONTRADICTORY_LIMIT = 0.01
"""Share of contradictory pairs from which the data is called unfit."""

_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """How to measure a text: in tokens where there is a tokenizer, else in characters."""

    columns: ColumnConfig
    chat: ChatFormat | None
    max_tokens: int

    @property
    def unit(self) -> str:
        return "tokens" if self.chat else "characters"

    def measure(self, records: Sequence[PreferenceRecord]) -> list[tuple[int, int, int] | TemplateFault]:
        """Length of prompt, chosen and rejected of each record, or what the template has against it."""
        if self.chat is None:
            return [_characters(record) for record in records]
        measured: list[tuple[int, int, int] | TemplateFault] = []
        texts: list[tuple[str, str]] = []
        for record in records:
            try:
                texts += [self.chat.render(record.prompt, side) for side in (record.chosen, record.rejected)]
            except TemplateFault as fault:
                measured.append(fault)
            else:
                measured.append((0, 0, 0))
        sizes = iter([(start, len(ids) - start) for ids, start in self.chat.tokenize(texts)])
        for place, entry in enumerate(measured):
            if not isinstance(entry, TemplateFault):
                (prompt, chosen), (_, rejected) = next(sizes), next(sizes)
                measured[place] = (prompt, chosen, rejected)
        return measured


@dataclass(kw_only=True)
class Examination:
    """What was found in one group of sources (training or eval)."""

    unit: str
    names: list[str] = field(default_factory=list)
    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    bad: list[LeftOut] = field(default_factory=list)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)  # prompt, chosen, rejected of each pair
    prompts: Counter[int] = field(default_factory=Counter)
    pairs: dict[tuple[int, str, str], list[str]] = field(
        default_factory=dict
    )  # prompt, chosen, rejected: row ids
    with_margin: int = 0
    with_scores: int = 0
    against_scores: list[str] = field(default_factory=list)  # rows whose chosen answer has the lower score
    cut: int = 0  # pairs longer than the limit
    too_long: int = 0  # of these, pairs with a response that alone is longer

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

    def bad_share(self) -> float:
        return len(self.bad) / max(self.rows, 1)

    def longer_wins(self) -> tuple[int, int]:
        """Pairs whose chosen answer is the longer one, and pairs whose answers differ in length."""
        differing = [(chosen, rejected) for _, chosen, rejected in self.lengths if chosen != rejected]
        return sum(chosen > rejected for chosen, rejected in differing), len(differing)

    def quantiles(self) -> dict[str, list[int]]:
        """Median, 95 % and 99 % quantile and maximum of the length of prompt, chosen and rejected."""
        table = np.array(self.lengths or [(0, 0, 0)])
        values = np.percentile(table, [50, 95, 99, 100], axis=0, method="higher").T
        return dict(zip(("prompt", "chosen", "rejected"), values.astype(int).tolist(), strict=True))


def examine(entries: Sequence[SourceConfig], ruler: Ruler) -> Examination:
    """Read all rows of ``entries``.

    Raises:
        DataError: if a source cannot be read at all.
    """
    sources = [open_source(entry) for entry in entries]
    names = row_names([file for source in sources for file in source.files])
    found = Examination(unit=ruler.unit, names=[source.name for source in sources])
    for source in sources:
        records = _usable_records(source, ruler.columns, names, found)
        while chunk := list(islice(records, _CHUNK_ROWS)):
            for (record, place), sizes in zip(chunk, ruler.measure([r for r, _ in chunk]), strict=True):
                if isinstance(sizes, TemplateFault):
                    found.bad.append(_left_out(place, record.row_id, "template fault", str(sizes)))
                else:
                    _add(found, record, sizes, ruler)
    return found


def shared_prompts(train: Examination, evals: Examination) -> tuple[int, int]:
    """Prompts that both have, and the number of eval pairs that ask one of them."""
    shared = train.prompts.keys() & evals.prompts.keys()
    return len(shared), sum(evals.prompts[key] for key in shared)


def serious_faults(train: Examination, evals: Examination | None, max_bad_share: float) -> list[str]:
    """Reasons not to train on this data as it is; none if it may do."""
    faults = []
    for role, found in (("train", train), ("eval", evals)):
        if found is None:
            continue
        if not found.usable:
            faults.append(f"{role}: there is no usable pair")
        elif found.bad_share() > max_bad_share:
            faults.append(
                f"{role}: {found.bad_share():.1%} of the rows are bad, allowed are {max_bad_share:.1%}"
            )
        if found.contradictory_share() > CONTRADICTORY_LIMIT:
            faults.append(f"{role}: {found.contradictory_share():.1%} of the pairs contradict each other")
    if evals and shared_prompts(train, evals)[0]:
        prompts, pairs = shared_prompts(train, evals)
        faults.append(
            f"{prompts} eval prompts ({pairs} of {evals.usable} eval pairs) are also in the training data"
        )
    return faults


def reasons(bad: Sequence[LeftOut]) -> dict[str, list[LeftOut]]:
    """Bad rows by reason, the most frequent reason first."""
    groups: dict[str, list[LeftOut]] = {}
    for row in bad:
        groups.setdefault(row.reason, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _usable_records(
    source: Source, columns: ColumnConfig, names: dict[str, str], found: Examination
) -> Iterator[tuple[PreferenceRecord, tuple[str, int]]]:
    for row in source.rows():
        found.rows += 1
        place = (source.files[row.file], row.line)
        row_id = f"{names[place[0]]}:{row.line}"
        try:
            record, shape = to_record(parsed(row), columns, row_id=row_id, source=source.name)
        except BadRow as fault:
            found.bad.append(_left_out(place, row_id, fault.reason, fault.detail))
        else:
            found.shapes[shape] += 1
            yield record, place


def _left_out(place: tuple[str, int], row_id: str, reason: str, detail: str) -> LeftOut:
    return LeftOut(file=place[0], line=place[1], row_id=row_id, reason=reason, detail=detail)


def _add(found: Examination, record: PreferenceRecord, sizes: tuple[int, int, int], ruler: Ruler) -> None:
    key = prompt_key(record.prompt)
    sides = [
        digest(*(message["content"].strip() for message in side)) for side in (record.chosen, record.rejected)
    ]
    found.prompts[key] += 1
    found.pairs.setdefault((key, sides[0], sides[1]), []).append(record.row_id)
    found.lengths.append(sizes)
    found.with_margin += record.margin is not None
    if record.chosen_score is not None and record.rejected_score is not None:
        found.with_scores += 1
        if record.chosen_score < record.rejected_score:
            found.against_scores.append(record.row_id)
    if ruler.chat:
        response = max(sizes[1], sizes[2])
        found.cut += sizes[0] + response > ruler.max_tokens
        found.too_long += response > ruler.max_tokens


def _characters(record: PreferenceRecord) -> tuple[int, int, int]:
    prompt, chosen, rejected = (
        sum(len(message["content"]) for message in side)
        for side in (record.prompt, record.chosen, record.rejected)
    )
    return prompt, chosen, rejected
