"""Weights in files, read from the headers of safetensors: how large they are, of which type, and whether whole."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from rlhf.core.errors import ModelError


def stored_type(path: str, revision: str | None = None) -> torch.dtype | None:
    """The one type of all weights in the files of a folder, or of a name of the hub that was fetched before."""
    folder = Path(path)
    if not folder.is_dir():
        index = try_to_load_from_cache(path, "config.json", revision=revision)
        folder = Path(index).parent if isinstance(index, str) else folder
    types = {entry["dtype"] for entry in tensors_of(folder)}
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return known.get(types.pop()) if len(types) == 1 else None


def checkpoint_bytes(folder: Path, dtype: torch.dtype) -> int | None:
    """Size of the weights in ``dtype``, from the safetensors headers; ``None`` for names of the hub."""
    elements = [elements_of(entry) for entry in tensors_of(folder)]
    return sum(elements) * dtype.itemsize if elements else None


def tensors_of(folder: Path) -> list[dict[str, Any]]:
    """Shape and type of each tensor in the safetensors files of ``folder``, as their headers have them.

    Raises:
        ModelError: if a file is not whole, or is no such file.
    """
    found: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.safetensors")):
        entries = _header(file)
        found += [entry for name, entry in entries.items() if name != "__metadata__"]
    return found


def _header(file: Path) -> dict[str, Any]:
    whole = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        size = int.from_bytes(start, "little")
        header = handle.read(size) if 8 + size <= whole else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        pointer = start == b"version "
        what = "the pointer of a file in Git LFS (git lfs pull fetches the file)" if pointer else "no safetensors file"
        raise ModelError(f"{file}: the weights are {what}, or cut short: {whole} bytes") from None
    if 8 + size + max(ends, default=0) != whole:
        expected = 8 + size + max(ends, default=0)
        raise ModelError(f"{file}: the weights are cut short or damaged: {whole} bytes, expected {expected}")
    return entries


def elements_of(entry: dict[str, Any]) -> int:
    return torch.Size(entry["shape"]).numel()
