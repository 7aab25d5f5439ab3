"""Files that are either whole or absent: written under a temporary name, then renamed."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf.core.errors import ConfigError, DiskFull

LITTLE_BYTES = 2**20
WHOLE_BYTES = 64 * 2**20
"""A larger file of weights is not read whole for its name."""
PIECE_BYTES, PIECES = 64 * 2**10, 4
"""How much of each tensor of a larger one is read, and at how many places."""

NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Numbers of errors that a folder of somebody else gives, or a disk that is only to be read."""
CONFIG = "config.yaml"
"""All settings of a run, in its folder from its first step on."""
STATUS, RECIPE, DONE, OWNER = "status.json", "recipe.yaml", "done.json", "owner.json"
ENVIRONMENT, DATA, WARNINGS = "environment.json", "data.json", "warnings.jsonl"
RUN_FILES = frozenset({STATUS, RECIPE, DONE, OWNER, ENVIRONMENT, DATA, WARNINGS})
"""Files at the top of a run folder that tell how the run goes and went. They are no part of its result."""


def write_text(path: Path, text: str, *, durable: bool = True, private: bool = False) -> None:
    """Replace ``path`` by ``text`` in one step; readers see the old or the new file, never half of it.

    Args:
        path: the file; its folder is made if it is not there.
        text: the whole content.
        durable: wait until the content is on the disk; without it, a machine that loses power may lose the file.
        private: nobody but the owner may read it, at any moment.
    """
    write_bytes(path, text.encode(), durable=durable, private=private)


def write_array(path: Path, values: np.ndarray) -> None:
    """Replace ``path`` by a NumPy file of ``values``, as :func:`write_text` does."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_bytes(path, buffer.getbuffer())


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace ``path`` by indented JSON with sorted keys, as :func:`write_text` does; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n", durable=durable)


def without_half_line(path: Path) -> bytes:
    """What a file of lines holds. Half a line at its end, left by a killed process, is cut off the file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that is appended to, without their ends; see :func:`without_half_line`."""
    return without_half_line(path).decode().split("\n")[:-1]  # other ends of lines stand inside of texts


def write_bytes(path: Path, content: bytes | memoryview, *, durable: bool = True, private: bool = False) -> None:
    """Replace ``path`` by ``content`` in one step, as :func:`write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        if private:
            temporary.touch(mode=0o600, exist_ok=False)
        with temporary.open("wb") as handle:
            handle.write(content)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


HALF_WRITTEN = re.compile(r"\..+\.(tmp|old)-\d+-[0-9a-f]{8}")
"""A temporary name: what a process that was killed leaves of a file or folder."""


def _temporary(path: Path, why: Literal["tmp", "old"] = "tmp") -> Path:
    """A hidden name beside ``path`` that no other process uses: containers on one disk may have equal process ids."""
    return path.with_name(f".{path.name}.{why}-{os.getpid()}-{secrets.token_hex(4)}")


def permit_as_new(folder: Path) -> None:
    """Give all that is in ``folder`` the permissions of files and folders that are made there now.

    Some writers open their files for the owner alone (safetensors does), whatever the umask. That is asked of
    ``folder``, which was just made: the umask of a process can only be read by changing it for all its threads.
    """
    granted = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        runs = path.is_dir() or mode & stat.S_IXUSR
        wanted = mode & ~0o777 | (granted if runs else granted & 0o666)
        if wanted != mode:
            path.chmod(wanted)


def replace_directory(staged: Path, target: Path) -> None:
    """Move ``staged`` to ``target``; an earlier ``target`` is put aside first and dropped after the move."""
    aside = _temporary(target, "old")
    if target.exists():
        os.replace(target, aside)
    os.replace(staged, target)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place when the block ends without an error."""
    with scratch_directory(target) as staged:
        yield staged
        permit_as_new(staged)
        replace_directory(staged, target)


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder of a hidden name like ``path`` that is gone after the block."""
    scratch = _temporary(path)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _not_permitted(error: Exception) -> ConfigError | None:
    """What to say if ``error`` came of a place that this process may not write to."""
    if not isinstance(error, OSError) or error.errno not in NOT_PERMITTED:
        return None
    return ConfigError(f"{place_of(error)}: {error.strerror}; mend the rights of the folder, or choose another")


def place_of(error: OSError) -> Path | None:
    """Which file or folder it is about: the folder of what has only a temporary name."""
    if not isinstance(error.filename, str | os.PathLike):
        return None
    path = Path(error.filename)
    return path.parent if HALF_WRITTEN.fullmatch(path.name) else path


def full_disk(error: Exception, folder: Path) -> DiskFull | None:
    """What to say if ``error`` came of a full disk under ``folder``; ``None`` if it did not.

    Writers of tensors report a full disk in words of their own, or in none: then what is left on it tells.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    left = shutil.disk_usage(place).free
    by_name = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if not by_name and left > LITTLE_BYTES:
        return None
    return DiskFull(
        f"{folder}: the disk is full ({left / 2**20:.1f} MiB left). What was finished before is intact: make room, and "
        "start again to go on from the newest checkpoint (train.keep_checkpoints=1 keeps fewer of them)"
    )


@contextlib.contextmanager
def naming_disk_faults(folder: Path) -> Iterator[None]:
    """Name the cause of what fails inside the block because of the disk.

    Raises:
        DiskFull: for whatever fails inside because the disk under ``folder`` is full.
        ConfigError: for a file that may not be read or written to.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        fault = _not_permitted(error) or full_disk(error, folder)
        if fault is None:
            raise
        raise fault from error


def is_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or below it, by name: nothing needs to be there."""
    path, folder = (Path(os.path.abspath(each)) for each in (path, folder))
    return path == folder or folder in path.parents


def digest(*parts: bytes | str) -> str:
    """A short stable name for contents: 16 hex digits of SHA-256 over the length-prefixed parts."""
    state = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.hexdigest()[:16]


def file_checksum(path: Path) -> str:
    """Size and CRC-32 of a file's content: tells a changed file from the one that was seen before."""
    size, value = 0, 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            size, value = size + len(block), zlib.crc32(block, value)
    return f"{size}:{value:08x}"


def weights_checksum(path: Path) -> str:
    """A name for the weights in a file, in seconds also where there are hundreds of gigabytes.

    Of a large safetensors file the header counts whole, with names, types and shapes of all tensors, and of each tensor
    ``PIECES`` pieces of ``PIECE_BYTES``, from its first byte to its last: training changes tensors all over. Any other
    file, and one that is no safetensors file by its content, is read whole as in :func:`file_checksum`.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors" or size <= WHOLE_BYTES:
        return file_checksum(path)
    with path.open("rb") as handle:
        header = handle.read(min(size, int.from_bytes(handle.read(8), "little")))
        try:
            spans = [each["data_offsets"] for name, each in json.loads(header).items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return file_checksum(path)
        value = zlib.crc32(header)
        for start, end in sorted(spans):
            last = max(start, end - PIECE_BYTES)
            for piece in sorted({start + (last - start) * number // (PIECES - 1) for number in range(PIECES)}):
                handle.seek(8 + len(header) + piece)
                value = zlib.crc32(handle.read(min(PIECE_BYTES, end - piece)), value)
    return f"{size}:{value:08x}"
