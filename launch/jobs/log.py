"""The end of a log, for showing to people, and exit codes in words. What a run says of itself is in its status."""

import re
from pathlib import Path

TAIL_BYTES = 8192
_CHATTER = re.compile(r"\[\d{4}-\d\d-\d\d |\[rank\d+\]:\[W|\[W\d+ ")
"""How lines of the launcher and of torch's process groups begin."""

def size(log: Path) -> int:
    """Bytes in a log, 0 if it is not there yet."""
    return log.stat().st_size if log.exists() else 0


def last_line(log: Path, start: int = 0) -> str:
    """What the stage itself said last after ``start`` bytes; of several lines of one message, all."""
    lines = [line.rstrip() for line in _tail(log, start).splitlines()]
    said = [line for line in lines if line.strip() and not _CHATTER.match(line)]
    message: list[str] = []
    while said:
        message.insert(0, said.pop())
        if not message[0].startswith("  "):
            break
    return "\n".join(message)


def meaning(code: int) -> str:
    """An exit code in words. The deepspeed command gives a signal's number as 256 less it, a shell as 128 more."""
    if code in (-9, 137, 247):
        return f"exit code {code}, killed by SIGKILL (if nobody did it: the kernel, out of host memory; see dmesg)"
    return f"exit code {code}"


def _tail(log: Path, start: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as handle:
        handle.seek(max(start, log.stat().st_size - TAIL_BYTES))
        return handle.read().decode("utf-8", errors="replace")
