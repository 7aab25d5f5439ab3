"""What lies in folders of runs that no run needs any more."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.runs import NOTES, put_aside_from
from rlhf.core.files import CONFIG, DONE, HALF_WRITTEN, OWNER
from rlhf.core.owner import check_not_owned

KINDS = {
    "leftovers": "halves of files and folders that a killed process was writing",
    "before": "runs that were put aside as NAME.before when they were done again",
    "checkpoints": "checkpoints of finished runs whose final/ is there; training cannot go on without them",
}


@dataclass(frozen=True, kw_only=True)
class Needless:
    """A file or folder that can go."""

    path: Path
    kind: str
    """One of ``KINDS``."""
    size: int
    """Bytes that it takes."""

    def remove(self) -> None:
        """Remove it; of several processes that do so at once, each is content."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def find_needless(folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> list[Needless]:
    """All that can go in ``folder`` and below it, in the order of paths.

    Raises:
        Owned: if a run or a pipeline is at work there.
    """
    for place in sorted(owner.parent for owner in folder.rglob(OWNER)):
        notes = next((each for each in (place, *place.parents) if each.name == NOTES), None)
        check_not_owned(place if notes is None else notes.parent, place=place)
    found = [(path, kind) for path, kind in _candidates(folder) if kind in kinds]
    return [Needless(path=path, kind=kind, size=_size(path)) for path, kind in sorted(found)]


def _candidates(folder: Path) -> Iterator[tuple[Path, str]]:
    """Links are not followed, and nothing is looked for in what can go itself."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        for name in [*folders, *files]:
            kind = _kind(here / name)
            if kind is not None:
                yield here / name, kind
                if name in folders:
                    folders.remove(name)


def _kind(path: Path) -> str | None:
    if path.is_symlink():
        return None
    if HALF_WRITTEN.fullmatch(path.name):
        return "leftovers"
    if not path.is_dir():
        return None
    later = put_aside_from(path)
    if later is not None and _is_run(path) and _is_run(later):
        return "before"
    run = path.parent
    if path.name == "checkpoints" and (run / DONE).is_file() and (run / "final" / "config.json").is_file():
        return "checkpoints"
    return None


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(_size(Path(place) / name) for place, _, names in os.walk(path) for name in names)
