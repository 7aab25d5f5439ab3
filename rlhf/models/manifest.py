"""The note beside a published model: what the next stage must agree with, and where the model came from."""

import importlib.metadata
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf.core.errors import ModelError
from rlhf.core.files import write_json

MANIFEST_NAME = "margin_rlhf_manifest.json"
FORMAT_VERSION = 1
POOLING = "last real token by attention mask"
PACKAGES = ("margin-rlhf", "torch", "transformers", "deepspeed", "peft", "pot")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a model depends on; packages that are absent are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, kw_only=True)
class RewardStatistics:
    """Rewards of held-out texts, chosen and rejected alike, in logits."""

    mean: float
    standard_deviation: float
    count: int
    """Number of texts that mean and deviation are taken over."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a reader of a published model cannot see in its weights."""

    stage: str
    """What the model is: "reward"."""
    base_model: str
    """Folder or hub name that training started from."""
    template_digest: str
    tokenizer_digest: str
    pad_policy: dict[str, Any]
    """Padding and end tokens, as ``rlhf.models.tokenizer.pad_policy`` gives them."""
    vocabulary_size: int
    """Tokens that the tokenizer knows, added ones included."""
    head_kind: str
    head_dtype: str
    rewards: RewardStatistics | None
    """``None`` when nothing was held out."""
    margin_statistics: dict[str, float]
    loss: dict[str, Any]
    """Loss and margin settings, in short."""
    training_data: str
    """Fingerprint of the training pairs."""
    system_prompt: str | None = None
    """What the template puts in front of conversations that have no system message; part of ``template_digest``."""
    thoughts_dropped: bool = False
    """Whether the template leaves the thoughts before answers out; part of ``template_digest``."""
    pooling: str = POOLING
    versions: dict[str, str] = field(default_factory=package_versions)
    format_version: int = FORMAT_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest into ``folder`` in one step and return its path.

    Raises:
        ModelError: if a number in it is not finite; nothing is written then.
    """
    values = asdict(manifest)
    broken = [name for name, number in _numbers(values) if not math.isfinite(number)]
    if broken:
        raise ModelError(
            f"the manifest of {folder} would hold numbers that are not finite ({', '.join(broken)}): the "
            "model gives no usable rewards; publish an earlier checkpoint"
        )
    path = folder / MANIFEST_NAME
    write_json(path, values)
    return path


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a published model.

    Raises:
        ModelError: if it is missing, damaged, or of a newer format; the message says what to do.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a folder that margin-rlhf published (RUN/final)")
    way_out = "publish the model again from a checkpoint of its run, or copy the folder afresh"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is damaged ({error}); {way_out}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ModelError(f"{path}: is damaged (no format_version); {way_out}")
    if version > FORMAT_VERSION:
        raise ModelError(
            f"{path}: has format {version}, and this margin-rlhf reads up to {FORMAT_VERSION}; "
            "upgrade margin-rlhf"
        )
    unknown = sorted(set(values) - {each.name for each in fields(Manifest)})
    try:
        manifest = TypeAdapter(Manifest).validate_python(values)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ModelError(f"{path}: is damaged ({found}); {way_out}") from error
    if unknown:
        raise ModelError(f"{path}: is damaged (unknown entries {', '.join(unknown)}); {way_out}")
    return manifest


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every float inside nested dicts and lists, with its dotted name."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{index}]")
