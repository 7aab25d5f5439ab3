"""Whether what the recipes read is there, as far as its path alone says that it is on this machine."""

import dataclasses
import glob
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from launch.doctor.finding import Finding
from launch.doctor.subject import Subject
from launch.runs import PipelineStage
from launch.stages import FILE, FOLDER
from rlhf.core.errors import DataError

_SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder of save_to_disk is known: it is not opened, for that takes seconds."""

Read = tuple[str, str, Callable[[], str | None]]
"""Setting, path, and what asks for its fault."""


def inputs(subject: Subject) -> Iterator[Finding]:
    """Data, prompts and published models that a stage would look for hours after the first one has started."""
    faults: dict[str, list[str]] = {}
    count = 0
    for stage in subject.stages:
        for key, path, fault in _reads(stage):
            if subject.will_make(path):
                continue
            count += 1
            found = fault()
            if found is not None:
                faults.setdefault(found, []).append(stage.setting(key))
    for words, settings in faults.items():
        remedy = f"put it there, or name another one (paths count from {Path.cwd()})"
        yield Finding("failure", f"{', '.join(dict.fromkeys(settings))}: {words}", remedy)
    if count and not faults:
        yield Finding("ok", f"{count} path(s) that the recipe reads: each is there, or may be a name on the hub")


def can_be_hub_model(path: str) -> bool:
    """Whether the hub could have a model of that name: NAME or OWNER/NAME."""
    return not path.startswith(("/", ".", "~")) and path.count("/") < 2


def _reads(stage: PipelineStage) -> Iterator[Read]:
    config = stage.config
    for section, rows in _row_sections(config):
        for role, sources in (("train", rows.train_sources), ("eval", rows.eval_sources)):
            for source in sources:
                yield f"{section}.{role}", source.path, partial(_data_fault, source)
    for key, path, kind in dict.fromkeys((*_listed(stage), *_models(stage))):
        is_there = Path.is_file if kind == FILE else Path.is_dir
        yield key, path, partial(_fault, Path(path).expanduser(), is_there, f"no such {kind}")


def _row_sections(node: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The sections of a recipe that name rows, wherever they stand, with their keys."""
    from rlhf.data.options import RowsConfig

    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{above}{field.name}"
        if isinstance(value, RowsConfig):
            yield key, value
        elif dataclasses.is_dataclass(value):
            yield from _row_sections(value, f"{key}.")


def _listed(stage: PipelineStage) -> Iterator[tuple[str, str, str]]:
    """What the table of stages says that a stage reads, but for functions and for what is in a package."""
    from rlhf.models.gguf import EMBEDDED

    for key, kind in stage.stage.reads.items():
        value = getattr(stage.config, key)
        named = {f"{key}.{name}": path for name, path in value.items()} if isinstance(value, dict) else {key: value}
        for setting, path in named.items():
            if str(path) != EMBEDDED and ":" not in str(path):
                yield setting, str(path), kind


def _models(stage: PipelineStage) -> Iterator[tuple[str, str, str]]:
    """Folders that models are loaded from, by setting, where the hub could have no such name or will not be asked."""
    for role in stage.models if stage.stage.trains else ():
        path = role.backbone.path
        if not role.inside and not (role.hub and can_be_hub_model(path)):
            yield role.setting, path, FOLDER


def _data_fault(source: Any) -> str | None:
    """Why a stage would refuse it; ``None`` also for one that may be on the hub."""
    from rlhf.data import sources

    path = Path(source.path).expanduser()
    is_here = path.exists() or glob.has_magic(source.path) or sources.looks_like_file(source.path)
    if not is_here or any((path / name).is_file() for name in _SAVED):
        return None
    try:
        sources.open_source(source)
    except DataError as error:
        return str(error)
    return None


def _fault(path: Path, is_there: Callable[[Path], bool], otherwise: str) -> str | None:
    return None if is_there(path) else f"{path}: {otherwise}"
