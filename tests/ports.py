"""TCP ports for tests, of which no two processes on this machine are given the same."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

BELOW_WHAT_THE_KERNEL_GIVES = range(20000, 30000)
FOLDER = Path(tempfile.gettempdir()) / f"ports-of-tests-{os.getuid()}"
_held: list[int] = []


def free_port() -> int:
    """Of this process up to its end, by a lock on a file of the port's name."""
    FOLDER.mkdir(exist_ok=True)
    for port in random.SystemRandom().sample(BELOW_WHAT_THE_KERNEL_GIVES, k=1000):
        lock = os.open(FOLDER / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            os.close(lock)
            continue
        _held.append(lock)
        return port
    raise OSError(f"no port of 1000 tried is free; locks are in {FOLDER}")
