"""The rows of one source as tokens: converted, rendered, tokenised, fitted to the length limit, and cached.

The cache is keyed by the content of the files, not their names, and by everything else that decides on the
tokens.
"""

import errno
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from rlhf.core.errors import DataError
from rlhf.core.files import digest, staged_directory
from rlhf.data import records, sources, store, templates
from rlhf.data.options import ColumnConfig, DataConfig
from rlhf.data.records import BadRow, Message, PreferenceRecord, prompt_key, to_record
from rlhf.data.report import OVER_LENGTH, TOO_LONG
from rlhf.data.sources import RawRow, Source
from rlhf.data.store import BadEntry, DamagedStore, PairStore, PairWriter
from rlhf.data.templates import ChatFormat, TemplateFault

_CHUNK_ROWS = 256
_BAR_FROM_ROWS = 5000

Side = tuple[np.ndarray, int]  # token ids (T,) and the first response token


@dataclass(frozen=True, kw_only=True)
class TokenisedSource:
    """A source and the tokens of its pairs."""

    source: Source
    store: PairStore
    cached: bool
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tokenising:
    """What decides on the tokens of a pair."""

    format: ChatFormat
    columns: ColumnConfig
    system_prompt: str | None
    max_tokens: int
    over_length: str

    @classmethod
    def of(cls, config: DataConfig, columns: ColumnConfig | None, chat: ChatFormat) -> "Tokenising":
        return cls(
            format=chat,
            columns=columns or config.columns,
            system_prompt=config.system_prompt,
            max_tokens=config.max_tokens,
            over_length=config.over_length,
        )

    def digest(self) -> str:
        settings = [self.system_prompt, self.max_tokens, self.over_length, asdict(self.columns)]
        return digest(self.format.tokenizer_digest, self.format.digest, json.dumps(settings), _code_digest())

    def render(self, record: PreferenceRecord) -> list[tuple[str, str]]:
        """Prompt text and whole text, of chosen and of rejected. Raises TemplateFault."""
        prompt: Sequence[Message] = record.prompt
        if self.system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self.system_prompt}, *prompt]
        return [self.format.render(prompt, side) for side in (record.chosen, record.rejected)]


def tokenise_source(source: Source, settings: Tokenising, cache_dir: Path) -> TokenisedSource:
    """The tokens of ``source``, from the cache if they are there and whole, else made and cached.

    Raises:
        DataError: if a file is damaged, the cache cannot be written, or a pair is too long under ``error``.
    """
    folder = cache_dir / digest(source.digest(), settings.digest())
    note = None
    if folder.exists():
        try:
            return TokenisedSource(source=source, store=PairStore(folder), cached=True)
        except DamagedStore as error:
            note = f"the cached tokens of {source.name} were damaged and have been made again ({error})"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with staged_directory(folder) as staged, PairWriter(staged) as writer:
            _fill(writer, source, settings)
    except OSError as error:
        # Another process may just have published the same.
        if error.errno != errno.ENOTEMPTY:
            raise DataError(
                f"{cache_dir}: tokens cannot be kept here ({error}); set data.cache_dir"
            ) from error
    return TokenisedSource(source=source, store=PairStore(folder), cached=False, note=note)


def _fill(writer: PairWriter, source: Source, settings: Tokenising) -> None:
    rows = _with_progress(source.rows(), f"tokenising {source.name}")
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        writer.counts.rows += len(chunk)
        _add_chunk(writer, source, settings, chunk)


def _add_chunk(writer: PairWriter, source: Source, settings: Tokenising, chunk: Sequence[RawRow]) -> None:
    kept: list[tuple[RawRow, PreferenceRecord]] = []
    texts: list[tuple[str, str]] = []
    for row in chunk:
        try:
            row_id = f"{source.files[row.file]}:{row.line}"
            record, shape = convert_row(row, source, settings.columns, row_id)
            texts += settings.render(record)
        except BadRow as fault:
            writer.add_bad(BadEntry(file=row.file, line=row.line, reason=fault.reason, detail=fault.detail))
        except TemplateFault as fault:
            writer.add_bad(BadEntry(file=row.file, line=row.line, reason="template fault", detail=str(fault)))
        else:
            writer.counts.shapes[shape] = writer.counts.shapes.get(shape, 0) + 1
            kept.append((row, record))
    encoded = settings.format.tokenise(texts)
    for (row, record), sides in zip(kept, zip(encoded[::2], encoded[1::2], strict=True), strict=True):
        _add_pair(writer, settings, row, record, sides)


def convert_row(
    row: RawRow, source: Source, columns: ColumnConfig, row_id: str
) -> tuple[PreferenceRecord, str]:
    """The pair in a row of ``source``, and its shape. Raises BadRow."""
    if row.fault is not None:
        raise BadRow("unreadable row", row.fault)
    return to_record(row.value, columns, row_id=row_id, source=source.name)


def _add_pair(
    writer: PairWriter, settings: Tokenising, row: RawRow, record: PreferenceRecord, sides: tuple[Side, Side]
) -> None:
    longest = max(len(ids) for ids, _ in sides)
    if longest > settings.max_tokens:
        found = f"{longest} tokens, the limit is {settings.max_tokens}"
        if settings.over_length == "error":
            hint = "raise data.max_tokens, or set data.over_length to truncate_prompt_left or drop"
            raise DataError(f"{record.row_id}: {found}; {hint}")
        if settings.over_length == "drop":
            writer.add_bad(BadEntry(file=row.file, line=row.line, reason=OVER_LENGTH, detail=found))
            return
        response = max(len(ids) - start for ids, start in sides)
        if response > settings.max_tokens:
            detail = f"a response of {response} tokens, the limit is {settings.max_tokens}"
            writer.add_bad(BadEntry(file=row.file, line=row.line, reason=TOO_LONG, detail=detail))
            return
        writer.counts.truncated += 1
        bos = settings.format.tokenizer.bos_token_id
        sides = tuple(_cut_left(ids, start, longest - settings.max_tokens, bos) for ids, start in sides)
    numbers = (record.margin, record.chosen_score, record.rejected_score)
    writer.add((row.file, row.line), prompt_key(record.prompt), sides, numbers)


def _cut_left(ids: np.ndarray, start: int, excess: int, bos: int | None) -> Side:
    """The row without its first ``excess`` prompt tokens; a leading BOS stays where there is room for it."""
    excess = min(excess, start)
    if excess + 1 < start and ids[0] == bos:
        return np.concatenate([ids[:1], ids[excess + 1 :]]), start - excess
    return ids[excess:], start - excess


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


def _code_digest() -> str:
    """Of the code that turns rows into tokens: a new version of it makes its own cache entries."""
    modules = (records, sources, store, templates)
    return digest(Path(__file__).read_bytes(), *(Path(module.__file__).read_bytes() for module in modules))
