"""Who works in a run folder: ``owner.json``, made by one process, kept fresh by it, and taken away at its end.

Two runs in one folder would mix their metrics and break each other's checkpoints. No lock of the file system is asked
for: NFS and Lustre may have none. The file comes into being in one step with its content, on any of them, and its time
of change is the heartbeat. It is stale when its process is gone, or, on another machine, when it has not been touched
for a minute by the clock of the file system.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from rlhf.core.clock import process_started
from rlhf.core.errors import REFUSED_EXIT_CODE, STOP_FILE, ConfigError, UserError
from rlhf.core.files import OWNER, full_disk

SECONDS_BETWEEN_BEATS = 10.0
SECONDS_UNTIL_STALE = 60.0
"""An owner on another machine whose heartbeat stands still for so long is gone; on this one, that is asked."""

log = logging.getLogger(__name__)


class Owned(UserError):
    """Somebody else works in the folder."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that works in a folder."""

    what: str
    """What it is there for, in words."""
    host: str = field(default_factory=lambda: os.uname().nodename)
    machine: str = field(default_factory=lambda: machine())
    process: int = field(default_factory=os.getpid)
    started: float = field(default_factory=process_started)
    """When the process began, in seconds since the epoch: process ids come again."""
    job: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    """Number of its SLURM job, if it has one."""
    restart: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    """How often that job was started before."""
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    """No two owners have the same."""

    @property
    def name(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.what}, process {self.process} on {self.host}{job}"

    def is_known_gone(self) -> bool | None:
        """Whether it is gone, as far as this process can tell at once; ``None`` if its heartbeat has to tell."""
        is_own_job = self.job != "" and self.job == os.environ.get("SLURM_JOB_ID")
        if is_own_job and self.restart < int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            return True  # a job is started again only when nothing of it runs
        return not is_running(self.process, self.started) if self.machine == machine() else None


def machine() -> str:
    """Where process ids mean the same: containers on one host may have their own."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{os.uname().nodename} {space}".strip()


def is_running(process: int, started: float) -> bool:
    """Whether the process of this id that began at ``started`` still runs on this machine."""
    try:
        found = psutil.Process(process)
        return abs(found.create_time() - started) <= 1.0 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def owning(folder: Path, what: str, *, place: Path | None = None) -> Iterator[None]:
    """Be the owner of ``folder`` inside the block. A process whose folder is taken over all the same ends at once.

    Args:
        folder: is made if it is not there.
        what: this process is there for.
        place: where the owner file lies; ``folder`` itself if left out.
    Raises:
        Owned: naming the owner, if there is one that lives.
        DiskFull: if there is no room for the file.
        ConfigError: if the folder cannot be written to.
    """
    path, mine = (place or folder) / OWNER, Owner(what=what)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _claim(path, folder, mine)
    except OSError as error:
        full = full_disk(error, folder) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise full or ConfigError(
            f"output = {folder}: cannot be written to: {error.strerror}; give another output=FOLDER, or mend its rights"
        ) from None
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, folder, mine, ended), name="owner", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            if _read(path) == mine:
                path.unlink()


def check_not_owned(folder: Path, *, place: Path | None = None) -> None:
    """Only look.

    Args:
        folder: that may have an owner.
        place: where the owner file lies; ``folder`` itself if left out.
    Raises:
        Owned: naming the owner of ``folder``, if there is one that lives.
    """
    path = (place or folder) / OWNER
    if path.exists() and not _is_stale(path, _read(path)):
        raise _refusal(folder, _read(path))


def _claim(path: Path, folder: Path, mine: Owner) -> None:
    while not _create(path, mine):
        other = _read(path)
        if not _is_stale(path, other):
            raise _refusal(folder, _read(path))
        if other is not None:
            log.warning("%s: taken over from %s, which is gone", folder, other.name)
        _remove(path, other)


def _refusal(folder: Path, other: Owner | None) -> Owned:
    who = other.name if other is not None else "somebody"
    return Owned(f"{folder}: {who}, is at work here; wait for it, or stop it: touch {folder / STOP_FILE}")


def _create(path: Path, mine: Owner) -> bool:
    """Make the owner file, with its content in it from its first moment; false if there is one."""
    staged = path.with_name(f".{path.name}.{mine.mark}")
    text = json.dumps(asdict(mine), indent=2) + "\n"
    try:
        staged.write_text(text)
        os.link(staged, path)
        return True
    except FileExistsError:
        return _read(path) == mine  # a file server that was asked twice says so of its own success
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
            raise
        return _create_without_links(path, text)
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()


def _create_without_links(path: Path, text: str) -> bool:
    try:
        with path.open("x") as handle:
            handle.write(text)
    except FileExistsError:
        return False
    return True


def _is_stale(path: Path, other: Owner | None) -> bool:
    """Whether the owner is gone: asked of its process, else seen by a heartbeat that stands still."""
    known = other.is_known_gone() if other is not None else None
    if known is not None:
        return known
    try:
        seen = path.stat().st_mtime
        left = SECONDS_UNTIL_STALE - (_now(path.parent) - seen)
        if left > SECONDS_BETWEEN_BEATS:
            log.warning("%s: looking for a sign of life of %s", path, other.name if other is not None else "its owner")
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(0.5, SECONDS_BETWEEN_BEATS / 4))
            if path.stat().st_mtime != seen:
                return False
    except FileNotFoundError:
        return True
    return True


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which need not be that of this machine."""
    probe = folder / f".{OWNER}.{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except PermissionError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _remove(path: Path, stale: Owner | None) -> None:
    """Take the stale file away, one process at a time: no other may have come in its place in between."""
    turn = path.with_name(f".{path.name}.turn")
    if not _create_without_links(turn, ""):
        with contextlib.suppress(FileNotFoundError):
            if _now(path.parent) - turn.stat().st_mtime > SECONDS_UNTIL_STALE:
                turn.unlink()  # of one that was killed in its turn
        time.sleep(0.05)
        return
    with contextlib.suppress(FileNotFoundError):
        if _read(path) == stale:
            path.unlink()
    turn.unlink(missing_ok=True)


def _beat(path: Path, folder: Path, mine: Owner, ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_BEATS):
        with contextlib.suppress(OSError):
            other = _read(path)
            if other == mine:
                os.utime(path)
            elif other is not None and not ended.is_set():
                _end(f"{folder}: taken over by {other.name}, as this process had not been heard of for long: it ends")
            elif not path.exists() and path.parent.is_dir() and not ended.is_set():
                _create(path, mine)  # an import puts another folder in its place


def _end(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(REFUSED_EXIT_CODE)


def _read(path: Path) -> Owner | None:
    """``None`` for a file that is not there, or not one of these."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
