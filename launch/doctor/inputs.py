"""Whether what the recipes read is there, as far as its path alone says that it is on this machine."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from launch.doctor.finding import Finding
from launch.doctor.subject import Subject
from launch.runs import PipelineStage
from launch.stages import FILE, FOLDER
from policy.judging.config import JudgeConfig
from rlhf.core.paths import can_be_hub_name
from rlhf.data.options import row_sections

LOOPBACK = ("localhost", "127.0.0.1", "::1")
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
    yield from judge_keys(subject)
    if count and not faults:
        yield Finding("ok", f"{count} path(s) that the recipe reads: each is there, or may be a name on the hub")


def judge_keys(subject: Subject) -> Iterator[Finding]:
    """Keys of judges elsewhere, which would be asked for when all training is done."""
    judges = [
        judge for stage in subject.stages if isinstance(judge := getattr(stage.config, "judge", None), JudgeConfig)
    ]
    for judge in {(each.key_variable, each.url): each for each in judges if each.url is not None}.values():
        if urlsplit(judge.url).hostname not in LOOPBACK and not os.environ.get(judge.key_variable):
            text = f"judge.url = {judge.url}: the environment variable {judge.key_variable} holds no key"
            yield Finding("warning", text, f"set {judge.key_variable}, unless the endpoint wants none")


def _reads(stage: PipelineStage) -> Iterator[Read]:
    from rlhf.data.sources import fault_of

    for section, rows in row_sections(stage.config):
        for role, sources in (("train", rows.train_sources), ("eval", rows.eval_sources)):
            for source in sources:
                yield f"{section}.{role}", source.path, partial(fault_of, source)
    for key, path, kind in dict.fromkeys((*_listed(stage), *_models(stage))):
        yield key, path, partial(_absence, Path(path).expanduser(), kind)


def _listed(stage: PipelineStage) -> Iterator[tuple[str, str, str]]:
    """What the table of stages says that a stage reads, but for functions and for what is in a package."""
    from rlhf.models.gguf import EMBEDDED

    for key, kind in stage.stage.reads.items():
        value = getattr(stage.config, key)
        named = {f"{key}.{name}": path for name, path in value.items()} if isinstance(value, dict) else {key: value}
        for setting, path in named.items():
            if path is not None and str(path) != EMBEDDED and ":" not in str(path):
                yield setting, str(path), kind


def _models(stage: PipelineStage) -> Iterator[tuple[str, str, str]]:
    """Folders that models are loaded from, by setting, where the hub could have no such name or will not be asked."""
    for role in stage.models if stage.stage.trains else ():
        path = role.backbone.path
        if not role.inside and not (role.hub and can_be_hub_name(path)):
            yield role.setting, path, FOLDER


def _absence(path: Path, kind: str) -> str | None:
    is_there = path.is_file() if kind == FILE else path.is_dir()
    return None if is_there else f"{path}: no such {kind}"
