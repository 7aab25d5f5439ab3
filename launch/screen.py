"""How commands print: tables, sizes, and a console whose reader may go away."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GIB = 2**30


def gib(count: float | None) -> str:
    """``1.50 GiB``; less than a hundredth of it in MiB."""
    if count is None:
        return "-"
    if 0 < abs(count) < GIB / 100:
        return f"{count / 2**20:.2f} MiB"
    return f"{count / GIB:.2f} GiB" if abs(count) < 100 * GIB else f"{count / GIB:,.0f} GiB"


def titled_table(title: str, *headings: str) -> "Table":
    """A table of numbers, with what they are of in its first column."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    return table


def console() -> "Console":
    """Standard output; wide enough for tables where it is no terminal."""
    from rich.console import Console

    output: Any = OutputThatMayEnd(sys.stdout)  # a stream in all that a console does with it
    found = Console(highlight=False, file=output)
    if not found.is_terminal:
        found.width = max(found.width, 120)
    return found


class OutputThatMayEnd:
    """A stream whose reader may be gone, as when Ctrl-C ends ``| tee`` as well, or a terminal is closed.

    What nobody can read is left out; the work goes on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also for what Python flushes at its end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
