"""Ranks without the time that importing takes: forks of a process that has imported everything (tests/zygote.py)."""

import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.zygote import ENDED, STARTED

ZYGOTE = Path(__file__).with_name("zygote.py")
ROOT = ZYGOTE.parent.parent
NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Keeps Arrow from starting one when it is imported, which POT does where scikit-learn and pandas are installed."""
_used: list[float] = []


def cpu_seconds_of_forks() -> float:
    """Of those that have ended and were waited for."""
    return sum(_used)


class Zygote:
    """Starts on first use, and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._ask: socket.socket | None = None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> "ForkedProcess":
        """``python arguments``: a module after -m, or a script; with stdout and stderr in one pipe."""
        if self._ask is None:
            self._start()
        output, says = os.pipe()
        story, tells = os.pipe()
        request = {"arguments": [*arguments], "environment": dict(environment), "folder": str(folder)}
        socket.send_fds(self._ask, [json.dumps(request).encode()], [says, tells])
        os.close(says)
        os.close(tells)
        return ForkedProcess(output, story)

    def stop(self) -> None:
        if self._ask is not None:
            self._ask.close()
            self._process.wait(timeout=10)

    def _start(self) -> None:
        self._ask, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, str(ZYGOTE), str(number)],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | NO_THREADS,
                pass_fds=[number],
                stdout=subprocess.DEVNULL,
            )


class ForkedProcess:
    """A fork, with the part of the interface of ``subprocess.Popen`` that tests of runs use."""

    def __init__(self, output: int, story: int) -> None:
        self.returncode: int | None = None
        self._story = story
        self.stdout = open(output, encoding="utf-8", errors="replace")  # noqa: SIM115
        told = os.read(story, STARTED.size)
        assert told, "the process that forks has ended; what it said is above"
        (self.pid,) = STARTED.unpack(told)

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that it printed, once it has ended and so has everything else that holds its output."""
        deadline = None if timeout is None else time.monotonic() + timeout
        said = io.BytesIO()
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.stdout], [], [], left)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout, said.getvalue())
            chunk = os.read(self.stdout.fileno(), 2**16)
            if not chunk:
                break
            said.write(chunk)
        self.stdout.close()
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return said.getvalue().decode(errors="replace"), None

    def send_signal(self, number: int) -> None:
        """Nothing happens to one that has ended: its process id may be somebody else's."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._story], [], [], timeout)[0]:
            told = os.read(self._story, ENDED.size)
            assert told, "the process that forks has ended; what it said is above"
            self.returncode, used = ENDED.unpack(told)
            _used.append(used)
            os.close(self._story)
        return self.returncode
