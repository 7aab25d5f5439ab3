"""Resident memory of this process, for contenders that do not have this package."""

from pathlib import Path


def memory(field: str) -> int:
    """VmRSS or its peak VmHWM, in bytes.

    Not ru_maxrss of getrusage: Linux carries the parent's peak over into a child that it starts.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status: no {field}; this benchmark needs Linux")
