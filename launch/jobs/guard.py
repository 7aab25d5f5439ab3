"""Runs a command and ends all of it when the process that asked for it is gone.

    python guard.py LIFELINE COMMAND...

``LIFELINE`` is the reading end of a pipe whose other end only that process holds. However it dies, kill -9
included, the pipe closes; then the command's process group is told to terminate and, ten seconds later, killed.
Without this, ranks would go on training for a pipeline that is no longer there, and meet their successors.
Standard library only: it must start at once.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

SECONDS_TO_END = 10.0


def main(arguments: list[str]) -> int:
    lifeline, command = int(arguments[0]), arguments[1:]
    os.set_inheritable(lifeline, False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the pipe alone decides; launchers stay deaf to SIGUSR1, ranks listen
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_default_signals)
    ending = os.pidfd_open(process.pid)
    select.select([lifeline, ending], [], [])
    code = process.poll()
    end_group(process)
    return code if code is not None and code >= 0 else 128 + signal.SIGTERM if code is None else 128 - code


def end_group(process: subprocess.Popen) -> None:
    """End whatever is left of the process group that ``process`` leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + SECONDS_TO_END
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # reaps it, else it would count as a member of the group
                time.sleep(0.05)
                os.killpg(process.pid, 0)
            continue
        return


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
