"""Rows of one file: jsonl, json, csv, tsv (packed or not), parquet and arrow.

Text formats are read line by line, because a reader that infers one type per column for the whole file fails on the
first odd row; here such a row becomes an entry with a fault. A file whose content is not what its name says is
refused with what it seems to be.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.core.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (
    *LINE_SUFFIXES,
    *(f"{suffix}{packed}" for packed in PACKED_SUFFIXES for suffix in LINE_SUFFIXES),
    ".parquet",
    ".arrow",
)
KINDS = f"{', '.join(LINE_SUFFIXES)} (each also with {', '.join(PACKED_SUFFIXES)}), .parquet, .arrow"
"""The known suffixes, for people."""

Entry = tuple[int, Any, str | None]
"""The number of a row, from 1; what stands there; and why it could not be parsed, if it could not."""

_UNDECODED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes that are not UTF-8
_SPREAD_OBJECT = re.compile(rb"\{\s*\n\s*\"")  # the first key stands in a line of its own
_LARGEST_CELL = 1 << 27  # bytes in one csv cell; the csv module stops at 128 KiB unless told
_HEAD_BYTES = 4096
_BATCH_ROWS = 1024
_WRAPPERS = ("data", "rows", "train", "test", "examples", "instances", "items", "records", "conversations")


def suffix_of(path: Path) -> str:
    """The longest known suffix that a file has; empty if it has none."""
    name = path.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def read_rows(path: Path) -> Iterator[Entry]:
    """Every row of the file once.

    Raises:
        DataError: if the file is damaged, or is not what its name says.
    """
    suffix = suffix_of(path)
    packed = next((packed for packed in PACKED_SUFFIXES if suffix.endswith(packed)), "")
    try:
        yield from _READERS[suffix.removesuffix(packed)](path)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error})") from None
    except OSError as error:
        if error.errno is not None:  # of the file system; those of unpackers have no number
            raise
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error})") from None


# --------------------------------------------------------------------------------------------------- bytes


def _unpack_zst(path: Path) -> Any:
    import pyarrow  # it comes with datasets, and Python reads no such files before 3.14

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")


_UNPACKERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
    ".zst": (b"\x28\xb5\x2f\xfd", _unpack_zst),
}
"""How files begin that are packed so, and what opens them."""

_OTHER_FILES = {
    b"PAR1": "a parquet file; name it .parquet",
    b"ARROW1": "an arrow file; name it .arrow",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as csv",
    b"\xff\xfe": "UTF-16; make it UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; make it UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"version https://git-lfs": "the pointer of a file in Git LFS; fetch the file itself (git lfs pull)",
    b"<!DOCTYPE": "a page of HTML, such as a server sends in place of a file; download it anew",
    b"<html": "a page of HTML, such as a server sends in place of a file; download it anew",
    b"\x04\x22\x4d\x18": "packed by lz4; unpack it, or pack it by gzip, bzip2, xz or zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"SQLite format 3": "a database of SQLite; write its rows as jsonl or csv",
    b"\x80\x04\x95": "a pickle of Python; write its rows as jsonl",
    b"\x80\x05\x95": "a pickle of Python; write its rows as jsonl",
}
_TAR = slice(257, 262)
"""Where a tar archive says what it is."""


def _open(path: Path) -> io.BufferedReader:
    """The bytes of a text file, unpacked by what it is, whatever its name says.

    Raises:
        DataError: if it is no text.
    """
    with path.open("rb") as handle:
        start = handle.read(8)
    name = path.name.lower()
    packed = next((suffix for suffix, (magic, _) in _UNPACKERS.items() if start.startswith(magic)), "")
    named = next((suffix for suffix in PACKED_SUFFIXES if name.endswith(suffix)), "")
    if named and start and not packed:
        raise DataError(f"{path}: the compressed file is damaged or not packed: it does not begin as {named} files do")
    raw = _UNPACKERS[packed][1](path) if packed else path.open("rb")
    handle = io.BufferedReader(raw, 1 << 20)
    head = handle.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    found = _other_kind(head)
    if not found and head[:64].count(b"\0") > len(head[:64]) // 4:
        found = "UTF-16 without its mark, or no text at all; make it UTF-8"
    if found:
        handle.close()
        raise DataError(f"{path}: expected text in UTF-8, but the file is {found}")
    return handle


def _other_kind(head: bytes) -> str:
    """What a file is that begins so, where that can be told and rows are of another kind."""
    if head[_TAR] == b"ustar":
        return "a tar archive; unpack it"
    return next((words for magic, words in _OTHER_FILES.items() if head.startswith(magic)), "")


# --------------------------------------------------------------------------------------------------- lines


def _read_lines(path: Path) -> Iterator[Entry]:
    with _open(path) as handle:
        begin = handle.peek(_HEAD_BYTES)[:_HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
        line = begin.partition(b"\n")[0].strip()
        if line in (b"[", b"[{") or line.startswith(b"[{"):
            raise DataError(f"{path}: expected one JSON object a line, but the file is one JSON array; name it .json")
        if _SPREAD_OBJECT.match(begin):
            raise DataError(
                f"{path}: expected one JSON object a line, but here an object takes several; write each on one "
                "(jq -c . does)"
            )
        if b"\r" in begin.rstrip() and b"\n" not in begin:
            raise DataError(f"{path}: its lines end with CR alone, as on old Macs; write LF (tr '\\r' '\\n')")
        yield from _parse_lines(handle)


def _parse_lines(lines: Iterable[bytes]) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, _loaded(line.decode("utf-8-sig" if number == 1 else "utf-8")), None
        except UnicodeDecodeError as error:
            yield number, None, f"not UTF-8: {error.reason} at byte {error.start}"
        except json.JSONDecodeError as error:
            yield number, None, f"not JSON: {error.msg} at column {error.colno}"
        except RecursionError:
            yield number, None, "not JSON that can be read: nested too deeply"
        except _Twice as error:
            yield number, None, str(error)


class _Twice(ValueError):
    """A key stands twice in an object: which value is meant, nobody knows."""


def _loaded(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        _Twice, json.JSONDecodeError, RecursionError: if it is none.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(f"the key {_doubled([key for key, _ in pairs])!r} stands twice in an object")
    return found


def _doubled(names: Sequence[str]) -> str:
    """The first name that stands there a second time; empty without one."""
    return next((name for place, name in enumerate(names) if name in names[:place]), "")


def _read_json(path: Path) -> Iterator[Entry]:
    """One array of rows; a file that does not begin with ``[`` is read as lines."""
    with _open(path) as handle:
        raw = handle.read()
    begin = raw.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begin.startswith(b"["):
        _refuse_wrapped(path, begin)
        yield from _parse_lines(io.BytesIO(raw))
        return
    try:
        rows = _loaded(raw.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _Twice) as error:
        hint = "its rows cannot be told apart; save it as jsonl"
        raise DataError(f"{path}: not a valid JSON array ({error}); {hint}") from None
    yield from ((number, row, None) for number, row in enumerate(rows, start=1))


def _refuse_wrapped(path: Path, raw: bytes) -> None:
    """Refuse one object around the rows, where rows are expected.

    Raises:
        DataError: if the file is one object that holds the rows.
    """
    try:
        whole = json.loads(raw)
    except (ValueError, RecursionError):
        if _SPREAD_OBJECT.match(raw):
            raise DataError(
                f"{path}: neither one JSON array nor one object a line: objects take several lines (jq -c . writes "
                "each on one)"
            ) from None
        return
    if not isinstance(whole, dict):
        raise DataError(f"{path}: expected a JSON array of rows, or one object a line; the file is one other value")
    keys = ", ".join(list(whole)[:5])
    lists = [key for key, value in whole.items() if _is_rows(value)]
    several_lines = b"\n" in raw.strip()
    holder = next((key for key in lists if several_lines or (key in _WRAPPERS and len(whole) <= 3)), None)
    if holder is not None and not ({"prompt", "chosen", "messages", "completion"} & whole.keys()):
        raise DataError(
            f"{path}: the rows are wrapped in an object (keys: {keys}): they stand in {holder!r}. Save that list alone "
            f"(jq '.{holder}' {path.name})"
        )
    values = list(whole.values())
    columns = all(isinstance(value, list) and len(value) == len(values[0]) for value in values) and not lists
    indexed = all(isinstance(value, dict) and "0" in value for value in values)
    if len(values) > 1 and (indexed or (columns and len(values[0]) > 1)):
        raise DataError(f"{path}: an object of columns ({keys}), not rows; write it with orient='records'")
    if several_lines:
        raise DataError(f"{path}: one JSON object over several lines (keys: {keys}), not an array of rows")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


# -------------------------------------------------------------------------------------------------- tables


def _read_csv(path: Path) -> Iterator[Entry]:
    """Rows of a csv or tsv file with a header; the number is the line where the row begins."""
    csv.field_size_limit(_LARGEST_CELL)
    separator = "\t" if ".tsv" in suffix_of(path) else ","
    with _open(path) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=separator)
        header = next(reader, None)
        if header is None:
            return
        _refuse_other_separator(path, header, separator)
        _refuse_doubled(path, [name for name in header if name])
        while True:
            begins = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield begins, None, f"not csv: {error}"
                continue
            if cells is None:
                return
            if cells:
                yield begins, dict(zip(header, cells, strict=False)), _csv_fault(header, cells)


def _refuse_other_separator(path: Path, header: list[str], separator: str) -> None:
    others = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}
    found = next((mark for mark in others if mark != separator and len(header) == 1 and mark in header[0]), None)
    if found is None:
        return
    way_out = {"\t": "name it .tsv", ",": "name it .csv"}.get(found, "write it with commas")
    raise DataError(
        f"{path}: the header is one column, {header[0][:60]!r}: cells seem to be separated by {others[found]}, "
        f"expected {others[separator]}; {way_out}"
    )


def _refuse_doubled(path: Path, columns: Sequence[str]) -> None:
    twice = _doubled(columns)
    if twice:
        raise DataError(f"{path}: there are two columns {twice!r}; rename one of them")


def _csv_fault(header: list[str], cells: list[str]) -> str | None:
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the header has {len(header)}"
    if any(_UNDECODED.search(cell) for cell in cells):
        return "not UTF-8"
    return None


def _read_parquet(path: Path) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    _refuse_other_table(path, b"PAR1", "a parquet file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _numbered(path, file.iter_batches(batch_size=_BATCH_ROWS))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({one_line(error)})") from error


def _read_arrow(path: Path) -> Iterator[Entry]:
    import pyarrow

    _refuse_other_table(path, b"ARROW1", "an arrow file")
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            is_file = bytes(mapped.read(6)) == b"ARROW1"
            mapped.seek(0)
            if is_file:
                opened = pyarrow.ipc.open_file(mapped)
                yield from _numbered(path, (opened.get_batch(number) for number in range(opened.num_record_batches)))
            else:
                yield from _numbered(path, pyarrow.ipc.open_stream(mapped))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable arrow file ({one_line(error)})") from error


def _numbered(path: Path, batches: Iterable[Any]) -> Iterator[Entry]:
    number = 0
    for batch in batches:
        _refuse_doubled(path, batch.schema.names)
        for row in batch.to_pylist():
            number += 1
            yield number, {name: _without_nulls(cell) for name, cell in row.items()}, None


def _without_nulls(cell: Any) -> Any:
    """The cell without keys that hold null: a table gives every object the keys of all objects in its column."""
    if isinstance(cell, dict):
        return {key: _without_nulls(value) for key, value in cell.items() if value is not None}
    return [_without_nulls(value) for value in cell] if isinstance(cell, list) else cell


def _refuse_other_table(path: Path, magic: bytes, kind: str) -> None:
    with path.open("rb") as handle:
        head = handle.read(_HEAD_BYTES)
    if not head:
        raise DataError(f"{path}: the file is empty (0 bytes): a download that failed?")
    found = "" if head.startswith(magic) else _other_kind(head)
    if found:
        raise DataError(f"{path}: expected {kind}, but the file is {found}")


def one_line(error: Exception) -> str:
    """The message of an error, short."""
    return " ".join(str(error).split())[:300]


_READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
