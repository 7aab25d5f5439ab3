"""Tokenised pairs of one source, in a folder of flat memory-mapped arrays: the cache of tokenisation.

A folder holds ``tokens.bin`` (int32, the chosen and then the rejected row of every pair) and ``pairs.npy``
(one :data:`PAIR` record a pair); ``bad.jsonl`` lists the rows that were left out, ``meta.json`` has the
counts and a checksum of each file.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.core.files import write_json

TOKENS = "tokens.bin"
PAIRS = "pairs.npy"
BAD = "bad.jsonl"
META = "meta.json"

_BLOCK_PAIRS = 4096

PAIR = np.dtype(
    [
        ("file", "<i4"),  # index into Source.files
        ("line", "<i8"),  # from 1
        ("prompt_key", "<u8"),
        ("begin", "<i8"),  # where the chosen row begins in tokens.bin; the rejected row follows it
        ("length", "<i4", (2,)),  # tokens of chosen and rejected
        ("start", "<i4", (2,)),  # first response token of chosen and rejected
        ("number", "<f8", (3,)),  # margin, chosen score, rejected score; nan where there is none
    ]
)


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


class PairStore:
    """A published folder, opened for reading."""

    def __init__(self, folder: Path) -> None:
        meta = _checked_meta(folder)
        self.content = json.dumps(meta["checksums"], sort_keys=True)
        self.counts = StoreCounts(**meta["counts"])
        lines = (folder / BAD).read_text(encoding="utf-8").splitlines()
        self.bad = tuple(BadEntry(**json.loads(line)) for line in lines)
        self.pairs: np.ndarray = np.load(folder / PAIRS, mmap_mode="r")
        empty = (folder / TOKENS).stat().st_size == 0  # which cannot be mapped
        self.tokens: np.ndarray = np.empty(0, "<i4") if empty else np.memmap(folder / TOKENS, "<i4", "r")

    def sides(self, pair: np.void) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
        """Token ids and first response token of chosen and of rejected; ``pair`` is a record of ``pairs``."""
        begin, lengths, starts = int(pair["begin"]), pair["length"].tolist(), pair["start"].tolist()
        ids = np.array(self.tokens[begin : begin + sum(lengths)], np.int32)
        return (ids[: lengths[0]], starts[0]), (ids[lengths[0] :], starts[1])


class PairWriter:
    """Fills a folder that :class:`PairStore` can open once the ``with`` block has ended well."""

    def __init__(self, folder: Path) -> None:
        self.counts = StoreCounts()
        self._folder = folder
        self._tokens = (folder / TOKENS).open("wb")
        self._bad = (folder / BAD).open("w", encoding="utf-8")
        self._blocks: list[np.ndarray] = []
        self._pairs: list[tuple[Any, ...]] = []  # the last few, which are not in a block yet
        self._written = 0

    def add(
        self,
        place: tuple[int, int],
        prompt_key: int,
        sides: Sequence[tuple[np.ndarray, int]],
        numbers: Sequence[float | None],
    ) -> None:
        """One pair.

        Args:
            place: file and line.
            prompt_key: 64 bits.
            sides: token ids and first response token, of chosen and of rejected.
            numbers: margin, chosen score, rejected score.
        """
        rows, starts = zip(*sides, strict=True)
        for row in rows:
            self._tokens.write(row.astype("<i4").tobytes())
        lengths = tuple(len(row) for row in rows)
        values = tuple(np.nan if number is None else number for number in numbers)
        self._pairs.append((*place, prompt_key, self._written, lengths, starts, values))
        self._written += sum(lengths)
        if len(self._pairs) >= _BLOCK_PAIRS:
            self._close_block()

    def add_bad(self, entry: BadEntry) -> None:
        self._bad.write(json.dumps(asdict(entry)) + "\n")

    def __enter__(self) -> "PairWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tokens.close()
        self._bad.close()
        if kind is None:
            self._finish()

    def _close_block(self) -> None:
        self._blocks.append(np.array(self._pairs, PAIR))
        self._pairs.clear()

    def _finish(self) -> None:
        self._close_block()
        np.save(self._folder / PAIRS, np.concatenate(self._blocks))
        checksums = {name: _checksum(self._folder / name) for name in (TOKENS, PAIRS, BAD)}
        meta = {"counts": asdict(self.counts), "checksums": checksums}
        write_json(self._folder / META, {**meta, "own_checksum": _text_checksum(meta)})


class DamagedStore(Exception):
    """The folder is not what was published."""


def _checked_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta.pop("own_checksum") != _text_checksum(meta):
            raise DamagedStore(f"{folder / META} has changed")
        for name, checksum in meta["checksums"].items():
            if _checksum(folder / name) != checksum:
                raise DamagedStore(f"{folder / name} has changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStore(f"{folder} cannot be read ({error})") from error
    return meta


def _text_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
