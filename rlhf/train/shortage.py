"""A run that runs out of memory ends in one line: what was the largest, and what to change next."""

import contextlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf.config import to_yaml
from rlhf.core.errors import OutOfMemory
from rlhf.engine.checkpoint import checkpoint_folder, saved_steps
from rlhf.engine.ranks import Ranks
from rlhf.train.fresh import plain_environment
from rlhf.train.recipe import StageConfig

ADVICE_SECONDS = 120.0

log = logging.getLogger(__name__)


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out: of a device, of the limit of this process, or of the host where it says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator of a CPU


@contextlib.contextmanager
def naming_shortage(config: StageConfig, stage: str, ranks: Ranks) -> Iterator[None]:
    """Turn what fails inside the block for want of memory into one line.

    The kernel ends a process that goes beyond the limit of its container without a word: its exit code is -9.

    Raises:
        OutOfMemory: on the rank that ran out of memory. The others are ended with it.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    else:
        return
    steps = saved_steps(checkpoint_folder(config.output))
    kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "nothing was saved yet"
    where = f"the {'GPU' if ranks.device.type == 'cuda' else 'host'} of rank {ranks.rank}"
    raise OutOfMemory(f"{where} is out of memory ({said[:200]}); {kept}. {_advice(config, stage, ranks)}")


def _advice(config: StageConfig, stage: str, ranks: Ranks) -> str:
    """What ``rlhf plan`` finds: it knows the stages, and is asked as a command."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        numbers = [ranks.local_size, max(1, ranks.world_size // ranks.local_size)]
        if ranks.device.type == "cuda":
            numbers.append(torch.cuda.get_device_properties(ranks.device).total_memory)
        command = [sys.executable, "-m", "launch.plan.shortage", stage, str(recipe), *map(str, numbers)]
        try:
            done = subprocess.run(
                command, env=plain_environment(), capture_output=True, text=True, timeout=ADVICE_SECONDS, check=True
            )
            return done.stdout.strip().splitlines()[-1]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            log.warning("rlhf plan could not be asked: %s", getattr(error, "stderr", None) or error)
            return "rlhf plan says what takes how much, and what to change"
