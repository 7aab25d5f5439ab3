"""Where a process prints."""

import io
import os
import sys
from pathlib import Path

from rlhf.core.errors import ConfigError


def this_rank() -> str:
    """The rank that the launcher gave this process, before it has joined the others."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def print_to(folder: Path | None) -> None:
    """Add what this process and its libraries print to ``folder/rank<N>.log`` from now on; ``None`` for no change.

    Raises:
        ConfigError: if the file cannot be written.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / f"rank{this_rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise ConfigError(f"--log-folder {folder}: cannot be written to: {error.strerror}") from None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    os.close(log)
