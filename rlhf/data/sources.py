"""Where rows come from: files, folders and globs of them, saved datasets, and the hub."""

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.core.errors import DataError
from rlhf.core.files import digest
from rlhf.core.paths import can_be_hub_name
from rlhf.data.formats import KINDS, one_line, read_rows, suffix_of
from rlhf.data.options import RowSource

_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_ABOUT = re.compile(r"(README|LICEN[CS]E|CHANGELOG|CITATION)", re.IGNORECASE)  # files about the data
_SHARD = re.compile(r"([-_.]\d+-of-\d+|[-_.]\d+)$")
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_.].*)?$", re.IGNORECASE)
_HELD_OUT = re.compile(r"(test|validation|valid|val|dev|eval)([-_.].*)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in a file; ``fault`` says why it could not be parsed."""

    file: int  # index into Source.files
    line: int  # line of a text file, row of any other; from 1
    value: Any
    fault: str | None = None


class Source:
    """Rows from files, in order."""

    def __init__(self, name: str, files: Sequence[str], notices: Sequence[str] = ()) -> None:
        """``notices``: what a reader of the report should know of how the files were found."""
        self.name = name
        self.files = tuple(files)
        self.notices = tuple(notices)

    def rows(self) -> Iterator[RawRow]:
        """Every row once.

        Raises:
            DataError: if a file turns out to be damaged.
        """
        for number, file in enumerate(self.files):
            yield from (RawRow(number, *entry) for entry in read_rows(Path(file)))

    def digest(self) -> str:
        """A name for the contents, whatever the files are called."""
        return digest(*(_file_digest(Path(file)) + suffix_of(Path(file)) for file in self.files))


class TableSource(Source):
    """Rows of a ``datasets.Dataset``: a hub dataset, or a folder written by ``save_to_disk``."""

    def __init__(self, name: str, table: Any, notices: Sequence[str] = ()) -> None:
        super().__init__(name, [name], notices)
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
        if config.split not in (None, _split_of(Path(path.name))):
            raise DataError(f"{config.path}: there is no split {config.split!r} in a single file; leave split unset")
        return Source(config.path, [_known(path)])
    if glob.has_magic(config.path):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise DataError(f"{config.path}: no file matches this pattern")
        if config.split is not None:
            raise DataError(f"{config.path}: a pattern names its files itself; leave split ({config.split!r}) unset")
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


def _known(path: Path) -> str:
    if not suffix_of(path):
        raise DataError(f"{path}: unknown kind of file; known are {KINDS}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: the file may not be read (permissions)")
    return str(path)


def looks_like_file(path: str) -> bool:
    return bool(suffix_of(Path(path))) or not can_be_hub_name(path)


def fault_of(config: RowSource) -> str | None:
    """Why :func:`open_source` would refuse a source; ``None`` also for what may be on the hub.

    A folder of save_to_disk is not opened, for that takes seconds: it is known by its files.
    """
    path = Path(config.path).expanduser()
    is_here = path.exists() or glob.has_magic(config.path) or looks_like_file(config.path)
    if not is_here or any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        open_source(config)
    except DataError as error:
        return str(error)
    return None


def _missing(path: Path) -> str:
    folder = path.parent
    if path.is_symlink():
        return f"{path}: a link to {path.readlink()}, which is not there"
    if not folder.is_dir():
        return f"{path}: no such file; there is no folder {folder} (paths count from {Path.cwd()})"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, 1, cutoff=0.4)
    hint = f"; did you mean {folder / near[0]}?" if near else ""
    return f"{path}: no such file or folder{hint}"


def _open_folder(folder: Path, config: RowSource) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        split = _choose_split(str(folder), splits, config.split)
        notices = _others_noted("splits", [other for other in splits if other != split])
        return _saved_table(folder / split, None, notices)
    if (folder / "state.json").is_file():
        return _saved_table(folder, config.split)
    visible = [path for path in sorted(folder.rglob("*")) if _is_visible_file(path, folder)]
    files = [path for path in visible if suffix_of(path)]
    lost = [path for path in folder.rglob("*") if suffix_of(path) and path.is_symlink() and not path.exists()]
    if lost:
        more = f", nor are those of {len(lost) - 1} more" if lost[1:] else ""
        raise DataError(f"{_missing(lost[0])}{more}")
    if not files:
        raise DataError(f"{folder}: the folder holds no data files ({KINDS})")
    unread = [str(path.relative_to(folder)) for path in visible if not suffix_of(path)]
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if len(by_split) > 1 and "" in by_split:
        odd = by_split[""][0].relative_to(folder)
        raise DataError(f"{folder}: some files are named after a split, but {odd} is not; give a glob")
    split = _choose_split(str(folder), sorted(by_split), config.split) if set(by_split) != {""} else ""
    if not split and config.split is not None:
        raise DataError(
            f"{folder}: there is no split {config.split!r}: no file or folder in it is named so; leave split unset to "
            "read all of it"
        )
    notices = _others_noted("files", unread) + _others_noted("splits", [name for name in by_split if name != split])
    return Source(config.path, [str(path) for path in by_split[split]], notices)


def _is_visible_file(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden and path.name not in _NOT_ROWS and not _ABOUT.match(path.name)


def _others_noted(what: str, names: Sequence[str]) -> tuple[str, ...]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (f"note: {what} that are not read: {', '.join(names[:5])}{more}",) if names else ()


def _split_of(path: Path) -> str:
    """The split that a file or its folder is named after, by its whole name: ``train_prefs`` for
    train_prefs-00000-of-00001.parquet; empty if neither is named after one."""
    stem = path.name[: -len(suffix_of(path))]
    whole = _SHARD.sub("", stem)
    if whole != stem and _SHARD.search(stem)[0].count("-of-"):  # type: ignore[index]
        return whole
    return next((part for part in (*path.parts[:-1], whole) if _SPLIT_NAME.match(part)), "")


def _choose_split(name: str, splits: Sequence[str], wanted: str | None) -> str:
    """The split that is wanted; where none is, ``train``, or the only one that begins so, or the only one at all."""
    known = ", ".join(splits)
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"{name}: there is no split {wanted!r}; set split to one of: {known}")
        return wanted
    if "train" in splits:
        return "train"
    training = [split for split in splits if split.startswith("train")]
    if len(training) == 1:
        return training[0]
    if len(splits) == 1 and not _HELD_OUT.match(splits[0]):
        return splits[0]
    several = f"several splits begin with 'train' ({', '.join(training)})" if training else "there is no split 'train'"
    raise DataError(f"{name}: {several}; set split to one of: {known}")


def _saved_table(folder: Path, split: str | None, notices: Sequence[str] = ()) -> Source:
    import datasets  # slow to import, and needed only here

    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a readable saved dataset ({one_line(error)})") from error
    if split is not None and split != str(table.split):
        raise DataError(f"{folder}: there is no split {split!r} in a single saved dataset; leave split unset")
    return TableSource(str(folder), table, notices)


def _open_hub(config: RowSource) -> Source:
    import datasets

    split = config.split or "train"
    try:
        table = datasets.load_dataset(config.path, config.subset, split=split)
    except Exception as error:  # the hub's libraries raise errors of many families
        raise DataError(
            f"{config.path}: there is no such local file or folder (looked in {Path.cwd()}), and loading it "
            f"from the hub failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    subset = f"/{config.subset}" if config.subset else ""
    return TableSource(f"{config.path}{subset}[{split}]", table)


def _file_digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()
