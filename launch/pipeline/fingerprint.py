"""What the result of a stage depends on: its settings, the files it reads, the code that makes it, and on what."""

import contextlib
import functools
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.pipeline.recipe import texts
from launch.runs import Pipeline, PipelineStage
from launch.stages import FOLDER, Stage
from rlhf.config import flat, result_values, to_dict
from rlhf.core.code import package_digest
from rlhf.core.files import DONE, RUN_FILES, digest, is_in, weights_checksum, write_json

CHANGES_SHOWN = 4
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""module:function, as rewards are given."""

RESULT, TOOLS = ("settings", "inputs"), ("code", "versions")
"""What is made, and what it is made with."""
LIBRARIES = ("deepspeed", "peft", "torch", "transformers")
Parts = dict[str, dict[str, Any]]
"""settings, inputs, code and versions, each a flat mapping."""


class Inputs:
    """Checksums of files, remembered by place on the disk, size and time of change, so that each is read once."""

    def __init__(self, memory: Path, *, writes: bool = True) -> None:
        """``memory``: the file that keeps them from one start to the next; ``writes``: whether it is written to."""
        self._memory, self._writes, self._read_now = memory, writes, False

    @functools.cached_property
    def _known(self) -> dict[str, list]:
        return self._kept()

    def _kept(self) -> dict[str, list]:
        try:
            known = json.loads(self._memory.read_text())
            return known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            return {}

    def checksum(self, path: Path) -> str:
        """A name for the content of a file, or of all files in a folder (hidden ones left out)."""
        self._read_now = False
        if path.is_file():
            found = self._of_file(path)
        else:
            names = {str(file.relative_to(path)): self._of_file(file) for file in files_in(path)}
            found = digest(*(part for item in names.items() for part in item))
        if self._read_now and self._writes:
            write_json(self._memory, self._kept() | self._known)  # others may have read other files meanwhile
        return found

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        state = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
        known = self._known.get(str(path))
        if known is None or known[:-1] != state:
            known = self._known[str(path)] = [*state, weights_checksum(path)]
            self._read_now = True
        return known[-1]


def parts_of(stage: PipelineStage, pipeline: Pipeline, inputs: Inputs, results: Mapping[str, str]) -> Parts:
    """All that decides what ``stage`` publishes.

    Args:
        results: names for what the finished stages published.
    """
    settings = flat(result_values(stage.config))
    upstream = {name: results.get(name, "not finished") for name in stage.needs}
    made = [each.output for each in pipeline.stages]
    named = [*_paths(settings), *_folders(stage)]
    outside = {str(path): inputs.checksum(path) for path in named if not any(is_in(path, folder) for folder in made)}
    code = {name: code_digest(name) for name in _code(stage.stage)}
    return {"settings": settings, "inputs": upstream | outside, "code": code, "versions": _versions()}


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def changes(before: Parts, now: Parts, sections: Sequence[str]) -> str:
    """What differs in these sections, in words; empty if nothing does. What was not recorded then did not change."""
    lines = []
    for section in sections:
        new = json.loads(json.dumps(now[section]))
        old = before.get(section, new)
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                lines.append(_change(section, key, old, new))
    more = f" and {len(lines) - CHANGES_SHOWN} more" if len(lines) > CHANGES_SHOWN else ""
    return ", ".join(lines[:CHANGES_SHOWN]) + more


def _change(section: str, key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if section == "code":
        return f"the code of {key} changed"
    if section == "inputs":
        if key in old and key in new:
            return f"{key} changed"
        return f"{key} is {'a new' if key in new else 'no longer an'} input"
    return f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}"


@functools.cache
def code_digest(package: str) -> str:
    """A name for the sources of a package, or of a module: Python files and JSON."""
    found = package_digest(package)
    return digest(*(file.read_bytes() for file in _module_file(package))) if found is None else found


def _code(stage: Stage) -> tuple[str, ...]:
    """What decides on the result of a stage: its packages, and the module that it is if that lies in none of them."""
    inside = any(f"{stage.module}.".startswith(f"{package}.") for package in stage.code)
    return stage.code if inside else (*stage.code, stage.module)


def _folders(stage: PipelineStage) -> Iterator[Path]:
    """Folders that a stage reads by the meaning of its settings: there a bare word is a folder, too."""
    settings = to_dict(stage.config)
    reads = [settings.get(key) for key, what in stage.stage.reads.items() if what == FOLDER]
    for text in texts([*(role.backbone.path for role in stage.models), *reads]):
        if _is_folder(text):
            yield Path(os.path.expanduser(text))


def _is_folder(text: str) -> bool:
    """Whether ``text`` names a folder whose content can be looked at: no whole disk, nor the working folder."""
    path = os.path.expanduser(text)
    return os.path.isdir(path) and os.path.realpath(path) not in (os.path.realpath(os.getcwd()), "/")


def _paths(settings: Mapping[str, Any]) -> Iterator[Path]:
    """Files and folders that settings name, at any depth: by path, by a pattern, or as the module of a function.

    A bare word counts only as a file: as a folder it could be anything.
    """
    for text in texts(settings):
        if _FUNCTION.fullmatch(text):
            yield from _module_file(text.partition(":")[0])
            continue
        path = os.path.expanduser(text)
        if ("/" in text and _is_folder(text)) or os.path.isfile(path):
            yield Path(path)
        elif glob.has_magic(path):
            yield from (Path(each) for each in sorted(glob.glob(path, recursive=True)) if os.path.isfile(each))


def _module_file(module: str) -> Iterator[Path]:
    """The source of a module; one of the working folder is found as the stage finds it."""
    here = Path(*module.split(".")).with_suffix(".py")
    if here.is_file():
        yield here
        return
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(module)
        if found is not None and found.origin and Path(found.origin).is_file():
            yield Path(found.origin)


def files_in(folder: Path) -> list[Path]:
    """What counts as the content of a folder: no hidden files, and in a run folder not those that tell how it went."""
    no_content = {folder / name for name in RUN_FILES if (folder / DONE).is_file()} | {folder / DONE}

    def counts(path: Path) -> bool:
        return path not in no_content and not any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(path for path in folder.rglob("*") if path.is_file() and counts(path))
