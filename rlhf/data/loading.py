"""The sources of a recipe: found, tokenized, reported on, and refused where too much of them is bad."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.core.errors import ConfigError, DataError
from rlhf.core.paths import home_path
from rlhf.data.options import Columns, RowsConfig, RowSource
from rlhf.data.report import (
    QUARANTINE,
    DataReport,
    LeftOut,
    SourceReport,
    noticed,
    refuse_bad_sources,
    write_quarantine,
)
from rlhf.data.sources import Source, open_source, row_names
from rlhf.data.templates import ChatFormat
from rlhf.data.tokenizing import RowKind, TokenizedSource, Tokenizing, tokenize_source

Role = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class LoadedSources:
    """All sources as tokens."""

    train: Sequence[TokenizedSource]
    evals: Sequence[TokenizedSource]
    names: Mapping[str, str]
    """Short names of the files."""
    report: DataReport


def load_sources(
    config: RowsConfig,
    kind: RowKind,
    columns_of: Callable[[Any], Columns],
    chat: ChatFormat,
    *,
    run_folder: Path | None,
    cache_dir: Path | None = None,
) -> LoadedSources:
    """Read, check and tokenize (or take from the cache) the sources of ``config``.

    Args:
        config: the data section of a recipe.
        kind: of the rows.
        columns_of: the column names of a source.
        chat: tokenizer and template of the run; ``config.template`` was read when it was opened.
        run_folder: where ``quarantine.jsonl`` goes; ``None`` writes none.
        cache_dir: where to keep tokens if ``config.cache_dir`` is unset; by default the user's cache folder.
    Raises:
        DataError: if a source cannot be read, or too many of its rows are bad.
    """
    folder = config.cache_dir or cache_dir or default_cache_dir()
    opened = _open_all(config)
    names = row_names([file for _, _, source in opened for file in source.files])
    parts: list[TokenizedSource] = []
    reports: list[SourceReport] = []
    for role, entry, source in opened:
        parts.append(tokenize_source(source, Tokenizing.of(config, kind, columns_of(entry), chat), folder))
        reports.append(_source_report(role, entry, parts[-1], kind.unit, names))
    quarantine = run_folder / QUARANTINE if run_folder else None
    if quarantine:
        write_quarantine(quarantine, reports)
    refuse_bad_sources(reports, config.quarantine_max_share, quarantine, check=kind.check)
    report = DataReport(
        template=chat.origin,
        unit=kind.unit,
        sources=reports,
        quarantine=str(quarantine) if quarantine else None,
        notes=[*_notes(chat), *(part.note for part in parts if part.note), f"tokens are kept in {folder}"],
    )
    train = len(config.train_sources)
    return LoadedSources(train=parts[:train], evals=parts[train:], names=names, report=report)


def default_cache_dir() -> Path:
    """The user's cache folder; where it cannot be made, as in containers without a home, one for temporary files."""
    try:
        folder = home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "margin-rlhf" / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, ConfigError):
        pass
    return Path(tempfile.gettempdir()) / f"margin-rlhf-{os.getuid()}" / "tokens"


def _open_all(config: RowsConfig) -> list[tuple[Role, RowSource, Source]]:
    entries: list[tuple[Role, RowSource]] = [("train", entry) for entry in config.train_sources]
    entries += [("eval", entry) for entry in config.eval_sources]
    opened: list[tuple[Role, RowSource, Source]] = []
    faults: list[str] = []
    for role, entry in entries:
        try:
            opened.append((role, entry, open_source(entry)))
        except DataError as error:
            faults.append(f"data.{role}: {error}")
    if faults:
        raise DataError("\n".join(faults))
    return opened


def _source_report(
    role: Role, entry: RowSource, part: TokenizedSource, unit: str, names: Mapping[str, str]
) -> SourceReport:
    left_out = []
    for row in part.store.bad:
        file = part.source.files[row.file]
        row_id = f"{names[file]}:{row.line}"
        left_out.append(LeftOut(file=file, line=row.line, row_id=row_id, reason=row.reason, detail=row.detail))
    counts = part.store.counts
    return SourceReport(
        role=role,
        name=part.source.name,
        weight=entry.weight,
        rows=counts.rows,
        items=len(part.store.rows),
        unit=unit,
        shapes=dict(counts.shapes),
        truncated=counts.truncated,
        cached=part.cached,
        left_out=left_out,
        notices=[*part.source.notices, *noticed(counts, [names[file] for file in part.source.files], unit)],
    )


def _notes(chat: ChatFormat) -> list[str]:
    if "strftime_now" in chat.template:
        return ["the template writes today's date into prompts; cached tokens keep the day they were made"]
    return []
