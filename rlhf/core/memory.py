"""How much memory this host has and how much of it is free, up to the limits of the control groups around the process.

A container, a SLURM job or a systemd service may have a limit far below what the host has; the kernel ends what goes
beyond it with signal 9. Both versions of control groups are read: of the process's own group, as ``/proc/self/cgroup``
names it, and of all groups above it, whose limits count as well.
"""

import os.path
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Memory of this host, in bytes."""

    total: int
    """All that the processes here may ever take together."""
    free: int
    """What new processes can take now; files that are only cached count as free."""
    limited: bool
    """Whether ``free`` ends at the limit of a control group, not at the memory of the host."""


@dataclass(frozen=True)
class _Files:
    """Names of a control group's files, which differ by version."""

    limit: str
    used: str
    cached: tuple[str, ...]
    """Lines of memory.stat with what the kernel gives up before it ends anything."""


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_VERSION_2 = _Files("memory.max", "memory.current", ("active_file", "inactive_file"))


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Memory of this host, or of the part of it that is lent to this process.

    Args:
        root: above ``proc`` and ``sys``.
    Returns:
        ``None`` where the system does not tell.
    """
    fields = _numbers(root / "proc" / "meminfo")
    if not {"MemTotal:", "MemAvailable:"} <= fields.keys():
        return None
    total, available = fields["MemTotal:"] * 1024, fields["MemAvailable:"] * 1024
    rooms = list(_rooms(root))
    free = min([available, *(max(0, limit - used) for limit, used in rooms)])
    return HostMemory(total=min([total, *(limit for limit, _ in rooms)]), free=free, limited=free < available)


def free_memory() -> int | None:
    """Bytes that new processes can take; ``None`` where the system does not tell."""
    found = host_memory()
    return None if found is None else found.free


def _rooms(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every control group around this process that has a limit."""
    mount = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _up_from(path, mount, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _up_from(path, mount / "memory", _VERSION_1)


def _up_from(path: str, top: Path, names: _Files) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of the group at ``path`` and of those above it.

    A container may be told the path that its group has on the host, and see the group itself as the top: groups that
    are not there are passed over.
    """
    group = top / os.path.normpath(f"/{path}").lstrip("/")
    for each in (group, *group.parents):
        limit, used = _number(each / names.limit), _number(each / names.used)
        if limit is not None and used is not None:
            stat = _numbers(each / "memory.stat")
            yield limit, used - sum(stat.get(name, 0) for name in names.cached)
        if each == top:
            return


def _number(path: Path) -> int | None:
    """The number in a file; ``None`` if it is absent or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """First number of each line by the word before it."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
