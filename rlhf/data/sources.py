"""Rows of jsonl, json, csv, parquet and arrow files, of folders and globs of them, and of hub datasets.

Text formats are read line by line, because a reader that infers one type per column for the whole file
fails on the first odd row; here such a row becomes a :class:`RawRow` with a fault. The binary formats and
the hub are read through ``datasets``.
"""

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.core.errors import DataError
from rlhf.core.files import digest
from rlhf.data.options import RowSource

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
SUFFIXES = (*LINE_SUFFIXES, *(f"{suffix}.gz" for suffix in LINE_SUFFIXES), ".parquet", ".arrow")

_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = ("train", "test", "validation", "valid", "dev", "eval")
_UNDECODED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes that are not UTF-8
_LARGEST_CELL = 1 << 27  # bytes in one csv cell; the csv module stops at 128 KiB unless told


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in a file; ``fault`` says why it could not be parsed."""

    file: int  # index into Source.files
    line: int  # line of a text file, row of any other; from 1
    value: Any
    fault: str | None = None


class Source:
    """Rows from files, in order."""

    def __init__(self, name: str, files: Sequence[str]) -> None:
        self.name = name
        self.files = tuple(files)

    def rows(self) -> Iterator[RawRow]:
        """Every row once.

        Raises:
            DataError: if a file turns out to be damaged.
        """
        for number, file in enumerate(self.files):
            path = Path(file)
            reader = _READERS[_suffix(path)]
            try:
                yield from (RawRow(number, *entry) for entry in reader(path))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path}: the compressed file is damaged or cut short ({error})") from None

    def digest(self) -> str:
        """A name for the contents, whatever the files are called."""
        return digest(*(_file_digest(Path(file)) + _suffix(Path(file)) for file in self.files))


class TableSource(Source):
    """Rows of a ``datasets.Dataset``: a hub dataset, or a folder written by ``save_to_disk``."""

    def __init__(self, name: str, table: Any) -> None:
        super().__init__(name, [name])
        self._table = table

    def rows(self) -> Iterator[RawRow]:
        return (RawRow(0, line, row) for line, row in enumerate(self._table, start=1))

    def digest(self) -> str:
        files = [_file_digest(Path(entry["filename"])) for entry in self._table.cache_files]
        return digest(*files, self._table._fingerprint)


def open_source(config: RowSource) -> Source:
    """Find what ``config.path`` names: first on this machine, then on the hub.

    Raises:
        DataError: if there is no such thing, or its format is not known.
    """
    path = Path(config.path).expanduser()
    if not config.path.strip():
        raise DataError("a data source has an empty path")
    if path.is_dir():
        return _open_folder(path, config)
    if path.is_file():
        return Source(config.path, [_known(path)])
    if glob.has_magic(config.path):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise DataError(f"{config.path}: no file matches this pattern")
        return Source(config.path, [_known(Path(match)) for match in matches])
    if looks_like_file(config.path):
        raise DataError(_missing(path))
    return _open_hub(config)


def row_names(files: Sequence[str]) -> dict[str, str]:
    """A short name for each file: its last path component, or as many as tell it from the others."""
    distinct = set(files)
    depth, most = 1, max((len(Path(file).parts) for file in distinct), default=1)
    while depth < most and len({Path(*Path(file).parts[-depth:]) for file in distinct}) < len(distinct):
        depth += 1
    return {file: str(Path(*Path(file).parts[-depth:])) for file in distinct}


# ------------------------------------------------------------------------------------------- finding files


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def _known(path: Path) -> str:
    if not _suffix(path):
        raise DataError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: the file may not be read (permissions)")
    return str(path)


def looks_like_file(path: str) -> bool:
    return bool(_suffix(Path(path))) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file; there is no folder {folder} (paths count from {Path.cwd()})"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, 1, cutoff=0.4)
    hint = f"; did you mean {folder / near[0]}?" if near else ""
    return f"{path}: no such file or folder{hint}"


def _open_folder(folder: Path, config: RowSource) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return _saved_table(folder / _choose_split(str(folder), splits, config.split), config)
    if (folder / "state.json").is_file():
        return _saved_table(folder, config)
    files = sorted(path for path in folder.rglob("*") if _holds_rows(path, folder))
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if len(by_split) > 1 and "" in by_split:
        odd = by_split[""][0].relative_to(folder)
        raise DataError(f"{folder}: some files are named after a split, but {odd} is not; give a glob")
    if set(by_split) - {""}:
        files = by_split[_choose_split(str(folder), sorted(by_split), config.split)]
    if not files:
        raise DataError(f"{folder}: the folder holds no data files ({', '.join(SUFFIXES)})")
    return Source(config.path, [str(path) for path in files])


def _holds_rows(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden and bool(_suffix(path)) and path.name not in _NOT_ROWS


def _split_of(path: Path) -> str:
    """The split that a file or its folder is named after: ``train`` for train-00000-of-00004.parquet."""
    words = (re.split(r"[^a-z]", part.lower(), maxsplit=1)[0] for part in path.parts)
    return next((word for word in words if word in _SPLIT_WORDS), "")


def _choose_split(name: str, splits: Sequence[str], wanted: str) -> str:
    if wanted not in splits:
        raise DataError(f"{name}: there is no split {wanted!r}; set split to one of: {', '.join(splits)}")
    return wanted


def _saved_table(folder: Path, config: RowSource) -> Source:
    import datasets  # slow to import, and needed only here

    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a readable saved dataset ({_one_line(error)})") from error
    return TableSource(str(folder), table)


def _open_hub(config: RowSource) -> Source:
    import datasets

    try:
        table = datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:  # the hub's libraries raise errors of many families
        raise DataError(
            f"{config.path}: there is no such local file or folder (looked in {Path.cwd()}), and loading it "
            f"from the hub failed: {type(error).__name__}: {_one_line(error)}"
        ) from error
    subset = f"/{config.subset}" if config.subset else ""
    return TableSource(f"{config.path}{subset}[{config.split}]", table)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _file_digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


# ------------------------------------------------------------------------------------------------- readers

_Entry = tuple[int, Any, str | None]


def _open_binary(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _read_lines(path: Path) -> Iterator[_Entry]:
    with _open_binary(path) as handle:
        yield from _parse_lines(handle)


def _parse_lines(lines: Iterable[bytes]) -> Iterator[_Entry]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), None
        except UnicodeDecodeError as error:
            yield number, None, f"not UTF-8: {error.reason} at byte {error.start}"
        except json.JSONDecodeError as error:
            yield number, None, f"not JSON: {error.msg} at column {error.colno}"
        except RecursionError:
            yield number, None, "not JSON that can be read: nested too deeply"


def _read_json(path: Path) -> Iterator[_Entry]:
    """One array of rows; a file that does not begin with ``[`` is read as lines."""
    with _open_binary(path) as handle:
        raw = handle.read()
    if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _parse_lines(io.BytesIO(raw))
        return
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        hint = "its rows cannot be told apart; save it as jsonl"
        raise DataError(f"{path}: not a valid JSON array ({error}); {hint}") from None
    yield from ((number, row, None) for number, row in enumerate(rows, start=1))


def _read_csv(path: Path) -> Iterator[_Entry]:
    """Rows of a csv file with a header; the number is the line where the row begins."""
    csv.field_size_limit(_LARGEST_CELL)
    with _open_binary(path) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text)
        header = next(reader, None)
        if header is None:
            return
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


def _csv_fault(header: list[str], cells: list[str]) -> str | None:
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the header has {len(header)}"
    if any(_UNDECODED.search(cell) for cell in cells):
        return "not UTF-8"
    return None


def _read_parquet(path: Path) -> Iterator[_Entry]:
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from ((number, row, None) for number, row in enumerate(table, start=1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_one_line(error)})") from error


def _read_arrow(path: Path) -> Iterator[_Entry]:
    import datasets

    try:
        table = datasets.Dataset.from_file(str(path))
        yield from ((number, row, None) for number, row in enumerate(table, start=1))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable arrow file ({_one_line(error)})") from error


_READERS = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_READERS |= {f"{suffix}.gz": _READERS[suffix] for suffix in LINE_SUFFIXES}
