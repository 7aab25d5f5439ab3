"""Tokenized rows of one source, in a folder of flat memory-mapped arrays: the cache of tokenization.

A folder holds ``tokens.bin`` (int32, two arrays of every row, one behind the other) and ``rows.npy`` (a record of
each row: :data:`PAIR`, :data:`EXAMPLE` or :data:`PROMPT`); ``bad.jsonl`` lists the rows that were left out,
``meta.json`` has the counts and a checksum of each file.
"""

import copy
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.core.files import digest, file_checksum, write_json

TOKENS = "tokens.bin"
ROWS = "rows.npy"
BAD = "bad.jsonl"
META = "meta.json"

FIRST_PLACES = 3
"""Rows that are named of those that have something in common."""

_BLOCK_ROWS = 4096

_PLACE = [
    ("file", "<i4"),  # index into Source.files
    ("line", "<i8"),  # from 1
    ("prompt_key", "<u8"),
    ("begin", "<i8"),  # where the first array begins in tokens.bin; the second one follows it
    ("length", "<i4", (2,)),  # of the two arrays
]

PAIR = np.dtype(
    [
        *_PLACE,  # the arrays are the tokens of chosen and of rejected
        ("start", "<i4", (2,)),  # first response token of chosen and rejected
        ("number", "<f8", (4,)),  # margin, chosen score, rejected score, labels.wrong_label; nan where there is none
    ]
)

EXAMPLE = np.dtype(
    [
        *_PLACE,  # the arrays are the tokens, and begin and end of each span of response tokens
        ("start", "<i4"),  # first response token
        ("label", "?"),  # False where rows have no labels
    ]
)

PROMPT = np.dtype(_PLACE)  # the arrays are the tokens, and messages and columns as text_as_numbers makes them


class Fields(NamedTuple):
    """What is kept of one row, beside its place and prompt."""

    arrays: tuple[np.ndarray, np.ndarray]
    own: tuple[Any, ...]
    """The fields that only records of this kind have, in their order."""


@dataclass(frozen=True, kw_only=True)
class BadEntry:
    """One row that was left out."""

    file: int
    line: int
    reason: str
    detail: str


@dataclass(kw_only=True)
class StoreCounts:
    """What became of the rows of one source."""

    rows: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    notes: dict[str, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)
    """What is noteworthy, with the number of rows, and file and line of the first few."""
    unread: dict[str, int] = field(default_factory=dict)
    """Columns that were not read, with the number of rows in which they hold something."""

    def notice(self, note: str, place: tuple[int, int]) -> None:
        count, places = self.notes.get(note, (0, []))
        self.notes[note] = (count + 1, [*places, place][:FIRST_PLACES])


class RowStore:
    """A published folder, opened for reading."""

    def __init__(self, folder: Path) -> None:
        meta = _checked_meta(folder)
        self.content = json.dumps(meta["checksums"], sort_keys=True)
        self.counts = StoreCounts(**meta["counts"])
        lines = (folder / BAD).read_text(encoding="utf-8").splitlines()
        self.bad = tuple(BadEntry(**json.loads(line)) for line in lines)
        self.rows: np.ndarray = np.load(folder / ROWS, mmap_mode="r")
        empty = (folder / TOKENS).stat().st_size == 0  # which cannot be mapped
        self.tokens: np.ndarray = np.empty(0, "<i4") if empty else np.memmap(folder / TOKENS, "<i4", "r")

    def arrays(self, row: np.void) -> tuple[np.ndarray, np.ndarray]:
        """The two arrays of ``row``, which is a record of ``rows``."""
        begin, (first, second) = int(row["begin"]), row["length"].tolist()
        values = np.array(self.tokens[begin : begin + first + second], np.int32)
        return values[:first], values[first:]

    def only(self, kept: np.ndarray) -> "RowStore":
        """The same folder without some of its rows: ``kept`` is a mask over ``rows``."""
        if kept.all():
            return self
        fewer = copy.copy(self)
        fewer.rows = self.rows[kept]
        fewer.content = digest(self.content, np.packbits(kept).tobytes())
        return fewer


class RowWriter:
    """Fills a folder that :class:`RowStore` can open once the ``with`` block has ended well."""

    def __init__(self, folder: Path, kind: np.dtype) -> None:
        """``kind`` is that of the records: :data:`PAIR`, :data:`EXAMPLE` or :data:`PROMPT`."""
        self.counts = StoreCounts()
        self._folder = folder
        self._kind = kind
        self._tokens = (folder / TOKENS).open("wb")
        self._bad = (folder / BAD).open("w", encoding="utf-8")
        self._blocks: list[np.ndarray] = []
        self._rows: list[tuple[Any, ...]] = []  # the last few, which are not in a block yet
        self._written = 0

    def add(self, place: tuple[int, int], prompt_key: int, fields: Fields) -> None:
        """Append one row; ``place`` is file and line, ``prompt_key`` has 64 bits."""
        for array in fields.arrays:
            self._tokens.write(array.astype("<i4").tobytes())
        lengths = tuple(array.size for array in fields.arrays)
        self._rows.append((*place, prompt_key, self._written, lengths, *fields.own))
        self._written += sum(lengths)
        if len(self._rows) >= _BLOCK_ROWS:
            self._close_block()

    def add_bad(self, entry: BadEntry) -> None:
        self._bad.write(json.dumps(asdict(entry)) + "\n")

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tokens.close()
        self._bad.close()
        if kind is None:
            self._finish()

    def _close_block(self) -> None:
        self._blocks.append(np.array(self._rows, self._kind))
        self._rows.clear()

    def _finish(self) -> None:
        self._close_block()
        np.save(self._folder / ROWS, np.concatenate(self._blocks))
        checksums = {name: file_checksum(self._folder / name) for name in (TOKENS, ROWS, BAD)}
        meta = {"counts": asdict(self.counts), "checksums": checksums}
        write_json(self._folder / META, {**meta, "own_checksum": _text_checksum(meta)})


def text_as_numbers(text: str) -> np.ndarray:
    """The UTF-8 bytes of ``text`` as int32, four to a number; spaces behind it fill the last one."""
    raw = text.encode()
    return np.frombuffer(raw + b" " * (-len(raw) % 4), "<i4")


def text_of_numbers(numbers: np.ndarray) -> str:
    """What :func:`text_as_numbers` was given, with up to three spaces behind it."""
    return numbers.astype("<i4").tobytes().decode()


class DamagedStore(Exception):
    """The folder is not what was published."""


def _checked_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta.pop("own_checksum") != _text_checksum(meta):
            raise DamagedStore(f"{folder / META} has changed")
        for name, checksum in meta["checksums"].items():
            if file_checksum(folder / name) != checksum:
                raise DamagedStore(f"{folder / name} has changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStore(f"{folder} cannot be read ({error})") from error
    return meta


def _text_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
