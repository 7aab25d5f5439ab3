"""Whether what the recipes read is there, as far as its path alone says that it is on this machine."""

import dataclasses
import glob
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from launch.doctor.finding import Finding, PlannedStage, Subject
from rlhf.core.errors import DataError

CHECK = "input files"
_SAVED = ("dataset_dict.json", "state.json")
"""In folders that save_to_disk wrote: these are not opened, for that takes seconds."""

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
    for fault, settings in faults.items():
        remedy = f"put it there, or name another one (paths count from {Path.cwd()})"
        yield Finding(CHECK, "failure", f"{', '.join(dict.fromkeys(settings))}: {fault}", remedy)
    if count and not faults:
        yield Finding(CHECK, "ok", f"{count} path(s) that the recipe reads: each is there, or may be a name on the hub")


def can_be_hub_model(path: str) -> bool:
    """Whether the hub could have a model of that name: NAME or OWNER/NAME."""
    return not path.startswith(("/", ".", "~")) and path.count("/") < 2


def _reads(stage: PlannedStage) -> Iterator[Read]:
    config = stage.config
    for section, rows in _row_sections(config):
        for role, sources in (("train", rows.train_sources), ("eval", rows.eval_sources)):
            for source in sources:
                yield f"{section}.{role}", source.path, partial(_data_fault, source)
    for key, path in _files(stage):
        yield key, path, partial(_fault, Path(path), Path.is_file, "no such file")
    for key, path in (*_published_models(stage), *_own_models(stage)):
        yield key, path, partial(_fault, Path(path).expanduser(), Path.is_dir, "no such folder")


def _row_sections(node: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The sections of a recipe that name rows, wherever they stand, with their keys."""
    from rlhf.data.options import RowsConfig

    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{above}{field.name}"
        if isinstance(value, RowsConfig):
            yield key, value
        elif dataclasses.is_dataclass(value):
            yield from _row_sections(value, f"{key}.")


def _files(stage: PlannedStage) -> Iterator[tuple[str, str]]:
    """Single files, by setting."""
    from launch.commands.import_gguf import EMBEDDED

    if stage.kind == "import" and stage.config.source != EMBEDDED:
        yield "source", stage.config.source
    elif stage.kind == "evaluate":
        yield "prompts", str(stage.config.prompts)


def _published_models(stage: PlannedStage) -> Iterator[tuple[str, str]]:
    """Folders that a stage of some run has published, by setting; the hub is not asked for these."""
    config = stage.config
    if stage.kind == "evaluate":
        yield "reference", str(config.reference)
        yield from ((f"policies.{name}", str(path)) for name, path in config.policies.items())
        if ":" not in config.reward:  # else a function
            yield "reward", config.reward
    elif stage.kind == "ppo":
        yield from (("reward.path", path) for path in config.reward.paths)
        if config.watch.second is not None:
            yield from (("watch.second.path", path) for path in config.watch.second.paths)


def _own_models(stage: PlannedStage) -> Iterator[tuple[str, str]]:
    """What a stage starts from and compares with, by setting, where the hub could have no such name."""
    from launch.stages import model_of

    if not stage.trains:
        return
    config, (section, name) = stage.config, model_of(stage.config)
    paths = {f"{name}.path": section.path}
    if hasattr(config, "reference"):
        paths["reference.path"] = config.reference.path
    if hasattr(config, "critic") and config.advantage.needs_values:
        paths["critic.path"] = config.critic.path
    yield from ((key, path) for key, path in paths.items() if path is not None and not can_be_hub_model(path))


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
