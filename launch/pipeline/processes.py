"""One pipeline at a time in a folder, told to stop by signal or file, and with nothing left of an earlier one."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.runs import NOTES, Pipeline
from rlhf.core.clock import process_started
from rlhf.core.errors import STOP_FILE
from rlhf.core.owner import owning

MARK = "RLHF_PIPELINE"
"""Environment variable that the processes of a pipeline carry: its folder."""
ONE_REQUEST_SECONDS = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Requests to stop: signals to this process, and a file STOP in the pipeline's folder."""

    def __init__(self, folder: Path) -> None:
        self._file, self._reason = folder / STOP_FILE, ""
        self._first_signal: float | None = None
        self.at_once = False
        """Somebody asked again: signals of one moment are one request (a closing terminal sends two)."""
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop; empty as long as nobody asked."""
        if not self._reason and self._file.exists():
            self._reason = f"{self._file} is there"
            self._file.unlink(missing_ok=True)
        return self._reason

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(OSError):
            if self._file.stat().st_mtime < process_started():  # meant for an earlier one
                self._file.unlink()
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays nohup
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self._first_signal = self._first_signal or now
        self.at_once |= now - self._first_signal > ONE_REQUEST_SECONDS
        self._reason = self._reason or signal.Signals(number).name


@contextlib.contextmanager
def alone(pipeline: Pipeline) -> Iterator[None]:
    """Hold the pipeline's folder; what an earlier pipeline left running there is ended.

    Raises:
        Owned: if another pipeline works in it.
        ConfigError: if it cannot be written to.
    """
    with owning(pipeline.output, "a pipeline", place=pipeline.output / NOTES):
        kill_all(processes_of(pipeline.output))  # its pipeline is gone, and it would write where this one does
        yield


def mark(folder: Path) -> dict[str, str]:
    """The environment variable by which leftovers are known."""
    return {MARK: str(folder.resolve())}


def processes_of(folder: Path) -> list[psutil.Process]:
    """What carries the mark of ``folder``, but for this process and those above it."""
    wanted, family = str(folder.resolve()), {os.getpid(), *(each.pid for each in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in family and process.environ().get(MARK) == wanted:
                found.append(process)
    return found


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """Kill ``processes``, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
