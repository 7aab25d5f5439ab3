"""Requests to stop a run: noted at any moment, honored by all ranks together at the next boundary of steps.

A signal handler only takes a note: saving takes all ranks, and when the signal comes they are in the middle of a
step. A note on one rank is enough, since DeepSpeed's launcher tells one rank at a time and waits for it to end.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from rlhf.core.clock import process_started
from rlhf.core.errors import STOP_FILE, RunStopped
from rlhf.engine.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger(__name__)

_noted: set[int] = set()  # a process has one set of handlers, so it has one set of notes


@contextlib.contextmanager
def noting_signals() -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 inside the block: they end nothing there, even where a parent had them ignored.

    Another one changes nothing: a job manager that signals every process of a run and a launcher that passes the
    signal on make two of one request. SIGINT is not touched, and SIGKILL is for those in a hurry.
    """
    _noted.clear()
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _noted.clear()


@contextlib.contextmanager
def sheltering_children() -> Iterator[None]:
    """A program that is started inside never hears SIGTERM or SIGUSR1: it lives as long as its work takes.

    A blocked signal is inherited, a handler is not. For this process the signals of the meantime come afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.add(number)


class StopRequests:
    """Whether a run shall stop: by a signal, by a file ``STOP`` in its folder, by its budget of time."""

    def __init__(self, folder: Path, ranks: Ranks, max_minutes: float | None) -> None:
        """Drops a ``STOP`` that is older than this process: it was meant for an earlier one.

        Args:
            folder: of the run; the main rank alone looks into it.
            max_minutes: budget, from the start of the process; ``None`` for no end.
        """
        self._file, self._ranks, self._max_minutes = folder / STOP_FILE, ranks, max_minutes
        self._started = process_started()
        if ranks.is_main and self._file.exists() and not self._file_asks():
            log.warning("%s is older than this process: removed, the run goes on", self._file)
            self._remove_file()

    def agreed(self) -> str | None:
        """What asks the run to stop, by a rank's word that all then share; ``None`` to go on.

        Every rank must call it. One small reduction; a ``STOP`` that is honored is removed.
        """
        mine = self._mine()
        flags = torch.tensor([float(flag) for flag in mine.values()], device=self._ranks.device)
        asked = self._ranks.sum(flags).tolist()
        found = [reason for reason, count in zip(mine, asked, strict=True) if count]
        if found and self._ranks.is_main:
            self._remove_file()
        return found[0] if found else None

    def check(self, place: str) -> None:
        """Where nothing is to be saved. Every rank must call it.

        Raises:
            RunStopped: on all ranks, if one of them is asked to stop.
        """
        reason = self.agreed()
        if reason is not None:
            raise RunStopped(reason, place)

    def _mine(self) -> dict[str, bool]:
        """Every reason, and whether this very rank has it; the same reasons on every rank."""
        minutes = (time.time() - self._started) / 60
        return {
            **{number.name: number in _noted for number in SIGNALS},
            f"the file {self._file}": self._ranks.is_main and self._file_asks(),
            f"train.max_minutes = {self._max_minutes}": self._max_minutes is not None and minutes > self._max_minutes,
        }

    def _file_asks(self) -> bool:
        try:
            return self._file.stat().st_mtime >= self._started
        except OSError:
            return False

    def _remove_file(self) -> None:
        with contextlib.suppress(OSError):  # the request counts all the same
            self._file.unlink()
