"""What became of the rows of each source: for people, for the run folder, and for the decision to go on."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from rlhf.core.errors import DataError
from rlhf.core.files import write_text
from rlhf.data.rows import MISSING_COLUMN
from rlhf.data.shapes import TIE
from rlhf.data.store import StoreCounts

QUARANTINE = "quarantine.jsonl"
TOO_LONG = "response too long"
OVER_LENGTH = "over length, dropped"
"""The reason listed for rows that ``over_length: drop`` leaves out; they do not count as bad."""
NOT_BAD = (OVER_LENGTH, TIE)
"""Reasons of rows that are left out as they should be."""
NAME_COLUMNS = "Columns of other names: data.columns.prompt=NAME and so on (docs/data.md: an example of every format)."
_READERS = {
    "input": "input",
    "context": "input",
    "system": "system",
    "system_prompt": "system",
    "subset": "group",
    "category": "group",
}
"""Settings that read columns of these names."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One row that was left out."""

    file: str
    line: int
    row_id: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.row_id}: {self.reason}: {self.detail}"


@dataclass(kw_only=True)
class SourceReport:
    """One source. Every row is an item, or left out, or repeats another one."""

    role: Literal["train", "eval"]
    name: str
    weight: float
    rows: int
    items: int
    unit: str
    """What an item is, in the plural: pairs, examples or prompts."""
    shapes: dict[str, int]
    """Readable rows by the shape they had."""
    truncated: int
    """Items that were cut on the left."""
    cached: bool
    """Whether the tokens came from the cache."""
    left_out: list[LeftOut]
    repeated: int = 0
    """Rows passed over because an earlier one has the same prompt."""
    notices: list[str] = field(default_factory=list)
    """What a reader should know of the rows, in lines that begin with ``note:`` or ``warning:``."""

    @property
    def dropped(self) -> int:
        """Rows left out because ``over_length`` says so."""
        return self._count(OVER_LENGTH)

    @property
    def ties(self) -> int:
        """Rows left out because they prefer neither answer."""
        return self._count(TIE)

    @property
    def bad(self) -> dict[str, int]:
        """Bad rows by reason, most frequent first."""
        reasons = dict.fromkeys(row.reason for row in self.left_out if row.reason not in NOT_BAD)
        return dict(Counter({reason: self._count(reason) for reason in reasons}).most_common())

    def _count(self, reason: str) -> int:
        """Rows left out for that reason: one that makes several pairs may be listed for each."""
        return len({(row.file, row.line) for row in self.left_out if row.reason == reason})

    def line(self) -> str:
        shapes = ", ".join(f"{count} {shape}" for shape, count in self.shapes.items())
        parts = [f"{self.rows} rows ({shapes})", f"{self.items} {self.unit}"]
        parts += [f"{self.repeated} repeats passed over"] if self.repeated else []
        parts += [f"{self.truncated} cut on the left"] if self.truncated else []
        parts += [f"{self.dropped} dropped as too long"] if self.dropped else []
        parts += [f"{self.ties} ties left out"] if self.ties else []
        parts += [f"{count} bad: {reason}" for reason, count in self.bad.items()]
        parts += [f"weight {self.weight:g}"] if self.weight != 1 else []
        parts += ["tokens from the cache"] if self.cached else []
        return f"{self.role} {self.name}: {', '.join(parts)}"


@dataclass(kw_only=True)
class DataReport:
    """What was loaded."""

    template: str
    """Where the chat template comes from."""
    sources: list[SourceReport]
    quarantine: str | None
    """The file that lists the rows left out."""
    notes: list[str]
    unit: str
    """What an item is, in the plural: pairs, examples or prompts."""
    train_items: int = 0
    """Items of one epoch, repeats by weight included."""
    eval_items: int = 0
    held_out_prompts: int | None = None
    """Prompts held out of the training sources; ``None`` where an eval source was given."""
    shared_prompts: int = 0
    """Prompts that both the training and the given eval sources hold."""
    one_prompt: bool = False
    """Whether all training items have the same prompt."""
    flipped: int = 0
    """Training pairs with swapped answers."""
    not_wanted: int = 0
    """Training rows passed over because of ``data.min_score_gap``."""
    row_tokens: dict[str, int] = field(default_factory=dict)
    """Quantiles of the tokens of a training row."""

    def describe(self, train_prompts: np.ndarray, eval_prompts: np.ndarray, lengths: np.ndarray) -> None:
        """Fill in what was made of the sources.

        Args:
            train_prompts: keys of the prompts of the training items.
            eval_prompts: the same of the evaluation.
            lengths: tokens of the training rows.
        """
        self.train_items, self.eval_items = len(train_prompts), len(eval_prompts)
        self.one_prompt = len(np.unique(train_prompts)) == 1
        self.shared_prompts = len(np.intersect1d(train_prompts, eval_prompts))
        quantiles = np.percentile(lengths, [50, 95, 99, 100], method="higher")
        self.row_tokens = dict(zip(("median", "95 %", "99 %", "longest"), map(int, quantiles), strict=True))

    def lines(self) -> list[str]:
        lines = [f"template: {self.template}", *(source.line() for source in self.sources)]
        if self.quarantine and any(source.left_out for source in self.sources):
            lines.append(f"the rows left out are listed in {self.quarantine}")
        flipped = f" ({self.flipped} with swapped answers)" if self.flipped else ""
        quantiles = ", ".join(f"{name} {count}" for name, count in self.row_tokens.items())
        if self.not_wanted:
            lines.append(f"{self.not_wanted} training {self.unit} have scores closer than data.min_score_gap")
        lines.append(f"train: {self.train_items} {self.unit} an epoch{flipped}; tokens of a row: {quantiles}")
        held_out = self.held_out_prompts
        origin = "" if held_out is None else f" of {held_out} prompts held out of the training sources"
        lines.append(f"eval: {self.eval_items} {self.unit}{origin}")
        if self.shared_prompts:
            lines.append(f"warning: {self.shared_prompts} prompts of the eval sources are also trained on")
        lines += [notice.replace(": ", f": {source.name}: ", 1) for source in self.sources for notice in source.notices]
        if self.one_prompt and self.train_items > 1:
            lines.append(f"warning: all training {self.unit} have the same prompt; {HIDDEN_QUESTION}")
        return [*lines, *(f"note: {note}" for note in self.notes)]


HIDDEN_QUESTION = "is a part of it in another column (data.columns.prompt, data.columns.input)?"
"""What to ask where all prompts are equal."""


def noticed(counts: StoreCounts, files: Sequence[str], unit: str) -> list[str]:
    """Lines on what is noteworthy of the rows of one source, whose files have these short names.

    Columns that are not read go along with ``unit`` = "prompts", for reward functions that ask for them.
    """
    lines = []
    for note, (count, places) in counts.notes.items():
        rows = ", ".join(f"{files[file]}:{line}" for file, line in places)
        lines.append(f"{note}: {count} rows, such as {rows}")
    if counts.unread:
        readers = [f"data.columns.{_READERS[name]}={name}" for name in counts.unread if name in _READERS]
        hint = f" (to read one: {', '.join(readers)})" if readers else ""
        what = "for reward functions alone" if unit == "prompts" else "that are not read"
        lines.append(f"note: columns {what}: {', '.join(counts.unread)}{hint}")
    return lines


def write_quarantine(path: Path, sources: list[SourceReport]) -> None:
    """List the rows left out of all ``sources``, one JSON object a line; without any, the file is empty."""
    rows = dict.fromkeys(row for source in sources for row in source.left_out)
    write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


def refuse_bad_sources(
    sources: list[SourceReport], max_share: float, quarantine: Path | None, *, check: str
) -> None:
    """Stop if no row of a source can be used, or if too large a share of the training or of the eval rows is bad.

    Args:
        sources: what was read.
        max_share: the share that is allowed.
        quarantine: the file with all rows left out.
        check: which kind of ``rlhf data check`` reads such rows.
    Raises:
        DataError: with counts by reason, the first examples, and where the whole list is.
    """
    faults = [fault for source in sources for fault in _nothing_in(source)]
    for role in ("train", "eval") if not faults else ():
        faults += _too_many_bad([source for source in sources if source.role == role], max_share)
    if faults:
        listed = [f"All rows left out are listed in {quarantine}."] if quarantine else []
        way_out = f"Mend the data, or change data.quarantine_max_share; `rlhf data check --kind {check}` shows more."
        if any(TOO_LONG in source.bad for source in sources):
            way_out += " Against long responses: raise data.max_tokens, or set data.over_length=drop."
        if any(MISSING_COLUMN in source.bad and not source.items for source in sources):
            way_out += f" {NAME_COLUMNS}"
        if any(source.dropped and not source.items for source in sources):
            way_out += " Against dropped rows: raise data.max_tokens."
        raise DataError("\n".join([*faults, *listed, way_out]))


def _nothing_in(source: SourceReport) -> list[str]:
    if source.items:
        return []
    if not source.rows:
        return [f"data.{source.role}: {source.name} has no rows"]
    head = f"data.{source.role}: {source.name} has no usable {source.unit.removesuffix('s')}"
    return ["\n".join([head, *_reasons([source])])]


def _too_many_bad(sources: list[SourceReport], max_share: float) -> list[str]:
    rows = sum(source.rows for source in sources)
    bad = sum(
        len({(row.file, row.line) for row in source.left_out if row.reason not in NOT_BAD}) for source in sources
    )
    if bad <= max_share * rows:
        return []
    head = (
        f"data.{sources[0].role}: {bad} of {rows} rows are bad ({bad / rows:.1%}; allowed: {max_share:.1%})"
    )
    return ["\n".join([head, *_reasons(sources)])]


def _reasons(sources: list[SourceReport]) -> list[str]:
    """Counts by reason and the first three examples, as indented lines."""
    rows = [row for source in sources for row in source.left_out]
    listed = dict.fromkeys((row.file, row.line, row.reason) for row in rows)
    counts = [f"  {count} x {reason}" for reason, count in Counter(reason for *_, reason in listed).most_common()]
    return [*counts, *(f"  {row}" for row in [row for row in rows if row.reason not in NOT_BAD][:3])]
