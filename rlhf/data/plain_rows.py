"""The rows of a file as they stand there, for commands that read no training data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.core.errors import DataError
from rlhf.data.messages import BadRow
from rlhf.data.options import RowSource
from rlhf.data.sources import open_source, row_names
from rlhf.data.tokenizing import parsed


def plain_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """File and line of each row, such as prompts.jsonl:12, and what stands there.

    Raises:
        DataError: if the file cannot be read, or a row of it, which is named.
    """
    source = open_source(RowSource(path=str(path)))
    names = row_names(source.files)
    for row in source.rows():
        place = f"{names[source.files[row.file]]}:{row.line}"
        try:
            yield place, parsed(row)
        except BadRow as error:
            raise DataError(f"{path}, {place}: {error}") from error
