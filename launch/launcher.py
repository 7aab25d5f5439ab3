"""Training jobs under the deepspeed launcher of this very environment."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SECONDS_TO_END = 10.0


def default_ranks() -> int:
    """All GPUs, or 2 processes on a CPU with 2 or more cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, len(os.sched_getaffinity(0)))


def launcher(ranks: int) -> list[str]:
    """The start of a command line, on a port that no other run has."""
    from rlhf.engine.ranks import free_port

    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def launcher_environment() -> dict[str, str]:
    """That of this process; what ranks print is not held back."""
    return os.environ | {"PYTHONUNBUFFERED": "1"}


def run_logged(command: Sequence[str], log: Path, tick: Callable[[], None]) -> int:
    """Run ``command`` with its output added to ``log``, calling ``tick`` about every second; the exit code.

    The command has a process group of its own, which ends with this call, whatever ends it: a launcher that is
    terminated alone would leave its ranks running.

    Raises:
        KeyboardInterrupt: also when this process is told to terminate.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, _termination_interrupts():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=launcher_environment(),
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=1.0)
                tick()
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + SECONDS_TO_END
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # reaps it, else it would count as a member of the group
                time.sleep(0.05)
                os.killpg(process.pid, 0)
        except ProcessLookupError:
            return


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Inside, a signal that would end this process on the spot raises KeyboardInterrupt; one it ignores stays so."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    ending = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
