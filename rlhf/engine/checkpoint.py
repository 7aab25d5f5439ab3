"""Full-state checkpoints: written beside their final name, verified file by file, rotated.

Layout: ``<folder>/step-00000120/`` with the engine's files, one ``rng-rank*.pt`` per rank, ``loop.json``,
``task.pt`` and ``COMPLETE.json``, which lists every file with its size and CRC-32. The folder must be
visible to all ranks.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf.core.files import digest, file_checksum, permit_as_new, write_json
from rlhf.engine.ranks import Ranks

COMPLETE = "COMPLETE.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run; ``keep`` is how many of the latest stay."""

    folder: Path
    ranks: Ranks
    keep: int

    def path(self, step: int) -> Path:
        return step_folder(self.folder, step)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, as the main rank sees them, oldest first."""
        return self.ranks.on_main(lambda: saved_steps(self.folder))

    def save(self, step: int, write: Callable[[Path], None], protected: frozenset[int] = frozenset()) -> None:
        """Let every rank ``write`` into a temporary folder, then name it and drop old checkpoints.

        Args:
            step: the number in the name.
            write: called on every rank with the folder to write into.
            protected: steps that rotation must leave.
        """
        target = self.path(step)
        staged = target.with_name(f".{target.name}.tmp")
        self.ranks.on_main(lambda: _fresh_directory(staged))
        self.ranks.together(lambda: write(staged))
        self.ranks.together(lambda: _save_random_state(staged, self.ranks.rank))
        sums = self._checksums(staged)
        self.ranks.on_main(lambda: self._publish(staged, target, sums, protected | {step}))

    def newest_intact(self) -> Path | None:
        """The latest checkpoint whose files are all there and unchanged; damaged ones are passed over, loudly."""
        for step in reversed(self.steps()):
            fault = self._fault(self.path(step))
            if fault is None:
                return self.path(step)
            if self.ranks.is_main:
                log.warning("checkpoint %s is damaged (%s): passing over it", self.path(step), fault)
        return None

    def restore_random_state(self, path: Path) -> None:
        """Set this rank's random state as of ``path``; a rank that is new since then gets a fixed one of its own."""
        _load_random_state(path, self.ranks.rank)

    def _fault(self, path: Path) -> str | None:
        listed = self.ranks.on_main(lambda: _read_listing(path))
        if isinstance(listed, str):
            return listed
        found = self._checksums(path)
        for name, entry in sorted(listed.items()):
            if name not in found:
                return f"{name} is missing"
            if found[name] != entry:
                return f"{name} has changed: {found[name]} instead of {entry} (bytes:CRC-32)"
        return None

    def _checksums(self, path: Path) -> dict[str, str]:
        """Size and CRC-32 of every file; the ranks share the reading."""
        names = self.ranks.on_main(lambda: _files_in(path))
        share = names[self.ranks.rank :: self.ranks.world_size]
        mine = self.ranks.together(lambda: {name: file_checksum(path / name) for name in share})
        return {name: entry for part in self.ranks.gather_objects(mine) for name, entry in part.items()}

    def _publish(self, staged: Path, target: Path, sums: dict, protected: frozenset[int]) -> None:
        write_json(staged / COMPLETE, sums)
        permit_as_new(staged)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staged, target)
        steps = saved_steps(self.folder)
        for step in steps[: -self.keep]:
            if step not in protected:
                shutil.rmtree(self.path(step))


def checkpoint_folder(output: Path) -> Path:
    """Where a run keeps its checkpoints, below its own folder."""
    return output / "checkpoints"


def step_folder(folder: Path, step: int) -> Path:
    """The checkpoint of ``step`` in ``folder``."""
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-????????"))


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _files_in(path: Path) -> list[str]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != COMPLETE)
    return sorted(str(file.relative_to(path)) for file in files)


def _read_listing(path: Path) -> dict | str:
    try:
        return json.loads((path / COMPLETE).read_text())
    except (OSError, ValueError) as error:
        return f"{COMPLETE} cannot be read: {error}"


def _save_random_state(folder: Path, rank: int) -> None:
    version, key, place, *rest = np.random.get_state(legacy=True)
    assert isinstance(key, np.ndarray)
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (version, key.tolist(), place, *rest),
    }
    torch.save(state, folder / f"rng-rank{rank}.pt")


def _load_random_state(folder: Path, rank: int) -> None:
    if not (folder / f"rng-rank{rank}.pt").exists():
        _seed_from((folder / "rng-rank0.pt").read_bytes(), rank)
        return
    state = torch.load(folder / f"rng-rank{rank}.pt", weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    version, key, *rest = state["numpy"]
    np.random.set_state((version, np.array(key, dtype=np.uint32), *rest))


def _seed_from(saved: bytes, rank: int) -> None:
    """Dropout is all that draws from it: the order of the data and sampled responses have seeds of their own."""
    seed = int(digest(saved, str(rank)), 16)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
