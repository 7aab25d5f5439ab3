"""The rows of one source as tokens: converted, rendered, tokenized, fitted to the length limit, and cached.

The cache is keyed by the content of the files, not their names, and by everything else that decides on the
tokens.
"""

import errno
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from rlhf.core.errors import DataError
from rlhf.core.files import digest, permit_as_new, replace_directory, scratch_directory
from rlhf.data import (
    built_in_templates,
    ending,
    formats,
    labels,
    markup,
    messages,
    records,
    rows,
    shapes,
    sources,
    store,
    template_text,
    templates,
)
from rlhf.data.messages import BadRow, Message, thoughts_and_answer, without_thoughts
from rlhf.data.options import Columns, RowsConfig
from rlhf.data.records import prompt_key
from rlhf.data.report import OVER_LENGTH, TOO_LONG
from rlhf.data.sources import RawRow, Source
from rlhf.data.spans import Span, after_thoughts
from rlhf.data.store import BadEntry, DamagedStore, Fields, RowStore, RowWriter
from rlhf.data.templates import ChatFormat, TemplateFault, Turns

_CHUNK_ROWS = 256
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
"""What the system says where a folder is to be moved to one that is there."""
_BAR_FROM_ROWS = 5000


class RowKind(Protocol):
    """What sets one kind of rows apart; ``rlhf.data.kinds`` has them.

    Attributes:
        record: of a row in the store.
    """

    @property
    def name(self) -> str:
        """Tells kinds apart in the cache."""

    @property
    def unit(self) -> str:
        """What a row makes, in the plural: pairs, or examples."""

    @property
    def check(self) -> str:
        """The kind for ``rlhf data check --kind``."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of an item that have a length: the prompt, and each of its answers."""

    record: np.dtype

    def answers(self, entry: Any) -> tuple[Sequence[Message], ...]:
        """What stands behind the prompt of a record."""

    def read(self, value: Any, columns: Any, *, row_id: str, source: str) -> tuple[list[Any], str]:
        """The records that a row of a file makes, of one prompt; and the shape of the row. Raises BadRow."""

    def render(self, entry: Any, settings: "Tokenizing") -> list[tuple[str, list[Span]]]:
        """The texts to tokenize, each with the characters that a model is to write. Raises TemplateFault."""

    def fields(self, entry: Any, sides: list[Turns]) -> Fields:
        """What to store of the tokens of these texts."""


@dataclass(frozen=True, kw_only=True)
class TokenizedSource:
    """A source and the tokens of its rows."""

    source: Source
    store: RowStore
    cached: bool
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """What decides on the tokens of a row."""

    kind: RowKind
    format: ChatFormat
    columns: Columns
    system_prompt: str | None
    thoughts: str
    max_tokens: int
    over_length: str

    @classmethod
    def of(cls, config: RowsConfig, kind: RowKind, columns: Columns, chat: ChatFormat) -> "Tokenizing":
        return cls(
            kind=kind,
            format=chat,
            columns=columns,
            system_prompt=config.system_prompt,
            thoughts=config.thoughts,
            max_tokens=config.max_tokens,
            over_length=config.over_length,
        )

    def digest(self) -> str:
        limits = [self.max_tokens, self.over_length]
        settings = [self.kind.name, self.system_prompt, self.thoughts, *limits, asdict(self.columns)]
        code = _code_digest(self.kind)
        return digest(self.format.tokenizer_digest, self.format.digest, json.dumps(settings), code)

    def with_system_prompt(self, prompt: Sequence[Message]) -> list[Message]:
        if self.system_prompt is None or prompt[0]["role"] == "system":
            return list(prompt)
        return [{"role": "system", "content": self.system_prompt}, *prompt]

    def shown_prompt(self, prompt: Sequence[Message]) -> list[Message]:
        """A prompt as the template gets it."""
        return self.shown(self.with_system_prompt(prompt))

    def shown(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template gets them.

        Raises:
            BadRow: if nothing is left of a message without its thoughts.
        """
        if self.thoughts != "drop":
            return list(messages)
        answers = [without_thoughts(message) for message in messages]
        for message in answers:
            if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
                raise BadRow("empty text", "an answer holds thoughts alone, which data.thoughts=drop takes away")
        return answers

    def thoughts_note(self, entry: Any) -> tuple[str, ...]:
        """What becomes of the thoughts in a record."""
        answers = (message for message in entry.messages if message["role"] == "assistant")
        if not any(thoughts_and_answer(message)[0] for message in answers):
            return ()
        fate = {"keep": "kept and learned", "drop": "dropped", "mask": "shown but not learned"}[self.thoughts]
        return (f"note: thoughts before answers are {fate} (data.thoughts={self.thoughts})",)

    def learned(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """The text, and of every turn what is to be learned."""
        if self.thoughts != "mask":
            return text, spans
        return text, [(after_thoughts(text, span), span[1]) for span in spans]

    def excess(self, row_id: str, sides: Sequence[Turns]) -> int:
        """How many tokens to cut from the left of every side.

        Raises:
            BadRow: if the row is to be left out.
            DataError: if the run is to stop.
        """
        longest = max(len(ids) for ids, _ in sides)
        if longest <= self.max_tokens:
            return 0
        found = f"{longest} tokens, the limit is {self.max_tokens}"
        if self.over_length == "error":
            hint = "raise data.max_tokens, or set data.over_length to truncate_prompt_left or drop"
            raise DataError(f"{row_id}: {found}; {hint}")
        if self.over_length == "drop":
            raise BadRow(OVER_LENGTH, found)
        excess = longest - self.max_tokens
        response = max(len(ids) - int(spans[-1, 0]) for ids, spans in sides)
        if response > self.max_tokens:
            raise BadRow(TOO_LONG, f"a response of {response} tokens, the limit is {self.max_tokens}")
        answered = [int(spans[-1, 0]) for ids, spans in sides if spans[-1, 0] < len(ids)]
        if answered and min(answered) - excess <= self.format.header_tokens:
            raise BadRow(TOO_LONG, f"{found}: beside a response of {response} tokens nothing is left of the prompt")
        return excess


def tokenize_source(source: Source, settings: Tokenizing, cache_dir: Path) -> TokenizedSource:
    """The tokens of ``source``, from the cache if they are there and whole, else made and cached.

    Raises:
        DataError: if a file is damaged, the cache cannot be written, or a row is too long under ``error``.
    """
    folder = cache_dir / digest(source.digest(), settings.digest())
    note = None
    if folder.exists():
        try:
            return TokenizedSource(source=source, store=RowStore(folder), cached=True)
        except DamagedStore as error:
            note = f"the cached tokens of {source.name} were damaged and have been made again ({error})"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with scratch_directory(folder) as staged:
            with RowWriter(staged, settings.kind.record) as writer:
                _fill(writer, source, settings)
            permit_as_new(staged)
            _publish(staged, folder)
    except OSError as error:
        if error.errno not in TAKEN:
            raise DataError(f"{cache_dir}: tokens cannot be kept here ({error}); set data.cache_dir") from error
    return TokenizedSource(source=source, store=RowStore(folder), cached=False, note=note)


def _publish(staged: Path, folder: Path) -> None:
    """Move tokens to where they belong, unless another process has put the same there: others may be reading these."""
    try:
        staged.rename(folder)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        try:
            RowStore(folder)
        except DamagedStore:
            replace_directory(staged, folder)


def parsed(row: RawRow) -> Any:
    """What stands in the row. Raises BadRow."""
    if row.fault is not None:
        raise BadRow("unreadable row", row.fault)
    return row.value


def cut_left(turns: Turns, excess: int, bos: int | None) -> Turns:
    """The row without its first ``excess`` tokens, but with all of its last turn.

    A turn that loses its beginning is not learned any more. A leading BOS stays where there is room for it.
    """
    ids, spans = turns
    excess = min(excess, int(spans[-1, 0]))
    spans = spans[spans[:, 0] >= excess] - excess
    if spans[0, 0] > 1 and ids[0] == bos:
        return np.concatenate([ids[:1], ids[excess + 1 :]]), spans
    return ids[excess:], spans


def _fill(writer: RowWriter, source: Source, settings: Tokenizing) -> None:
    entries = _with_progress(source.rows(), f"tokenizing {source.name}")
    while chunk := list(islice(entries, _CHUNK_ROWS)):
        writer.counts.rows += len(chunk)
        _add_chunk(writer, source, settings, chunk)


def _add_chunk(writer: RowWriter, source: Source, settings: Tokenizing, chunk: Sequence[RawRow]) -> None:
    kept: list[tuple[RawRow, Any, int]] = []  # with the number of texts
    texts: list[tuple[str, list[Span]]] = []
    for row in chunk:
        try:
            entries, shape = settings.kind.read(
                parsed(row), settings.columns, row_id=_row_id(source, row), source=source.name
            )
            rendered = [settings.kind.render(entry, settings) for entry in entries]
        except BadRow as fault:
            _leave_out(writer, row, fault)
        except TemplateFault as fault:
            _leave_out(writer, row, BadRow("template fault", str(fault)))
        else:
            writer.counts.shapes[shape] = writer.counts.shapes.get(shape, 0) + 1
            _take_notice(writer, settings, row, entries)
            for entry, shown in zip(entries, rendered, strict=True):
                kept.append((row, entry, len(shown)))
                texts += shown
    encoded = iter(settings.format.tokenize_turns(texts))
    for row, entry, count in kept:
        sides = list(islice(encoded, count))
        try:
            excess = settings.excess(_row_id(source, row), sides)
        except BadRow as fault:
            _leave_out(writer, row, fault)
            continue
        if excess:
            writer.counts.truncated += 1
            sides = [cut_left(side, excess, settings.format.tokenizer.bos_token_id) for side in sides]
        writer.add((row.file, row.line), prompt_key(entry.prompt), settings.kind.fields(entry, sides))


def _take_notice(writer: RowWriter, settings: Tokenizing, row: RawRow, entries: Sequence[Any]) -> None:
    """Count what is noteworthy of a row: what its reader says, and markup in its texts."""
    first, place = entries[0], (row.file, row.line)
    found = settings.format.markup([message for entry in entries for message in entry.messages])
    for note in (*first.notes, *found, *settings.thoughts_note(first)):
        writer.counts.notice(note, place)
    for column in first.unread:
        writer.counts.unread[column] = writer.counts.unread.get(column, 0) + 1


def _row_id(source: Source, row: RawRow) -> str:
    return f"{source.files[row.file]}:{row.line}"


def _leave_out(writer: RowWriter, row: RawRow, fault: BadRow) -> None:
    writer.add_bad(BadEntry(file=row.file, line=row.line, reason=fault.reason, detail=fault.detail))


def _with_progress(rows: Iterable[RawRow], title: str) -> Iterator[RawRow]:
    """``rows``, counted on the screen once they prove to be many."""
    columns = TextColumn("{task.description}"), TextColumn("{task.completed} rows"), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(title, total=None)
    try:
        for number, row in enumerate(rows, start=1):
            if number == _BAR_FROM_ROWS:
                bar.start()
            if number % _CHUNK_ROWS == 0:
                bar.update(task, completed=number)
            yield row
    finally:
        if bar.live.is_started:
            bar.stop()


def _code_digest(kind: RowKind) -> str:
    """Digest of the code that turns rows into tokens: a new version of it makes its own cache entries."""
    reading = (formats, labels, messages, records, rows, shapes, sources, store)
    rendering = (built_in_templates, ending, markup, template_text, templates)
    files = [__file__, inspect.getfile(type(kind)), *(inspect.getfile(module) for module in (*reading, *rendering))]
    return digest(*(Path(file).read_bytes() for file in files))
