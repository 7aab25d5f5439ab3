"""``python -m launch.jobs.asked_step FOLDER -- COMMAND...``: COMMAND, run by the job script for whoever has no srun.

A pipeline inside of a container starts its stages so. What it asks for is a file in FOLDER, a script that is complete
from its first moment; the job script, outside, runs it and leaves the exit code beside it. A file that ends with .end
asks for the end of the step, and when this process is gone without a word, the pipeline is, too, and the job ends all.
"""

import argparse
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.supervisor import split_command

STEPS_VARIABLE = "RLHF_STEPS"
"""Environment variable: the folder in which the job script looks for steps."""
CONTAINER_VARIABLE = "RLHF_CONTAINER"
"""Environment variable: the words that start a command inside of the container, as a shell has them."""
SECONDS_TO_END = 30.0


def asked_step(command: Sequence[str]) -> list[str]:
    """The command line that has the job script run ``command``."""
    return [sys.executable, "-m", "launch.jobs.asked_step", os.environ[STEPS_VARIABLE], "--", *command]


def container_words() -> list[str]:
    """What starts a command inside of the container, where steps are asked for; nothing elsewhere."""
    return shlex.split(os.environ[CONTAINER_VARIABLE]) if STEPS_VARIABLE in os.environ else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.jobs.asked_step", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    words, command = split_command(argv)
    options = parser.parse_args(words)
    step = options.folder / f"{time.time_ns()}-{secrets.token_hex(4)}"
    ended: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: ended.append(number))
    log = os.readlink("/proc/self/fd/1")
    script = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)} >> {shlex.quote(log)} 2>&1\n"
    step.with_suffix(".new").write_text(script)
    step.with_suffix(".new").rename(step.with_suffix(".asked"))
    deadline: float | None = None
    while not step.with_suffix(".code").exists():
        if ended and deadline is None:
            step.with_suffix(".end").touch()
            deadline = time.monotonic() + SECONDS_TO_END
        if deadline is not None and time.monotonic() > deadline:
            return 128 + ended[0]
        time.sleep(0.2)
    return int(step.with_suffix(".code").read_text())


if __name__ == "__main__":
    sys.exit(main())
