"""A model folder's weights, written file by file: nobody needs to hold all of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""Size of a file, as Transformers and the hub have had it for years: small beside any host that trains such a model."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors and writes a file whenever there is enough for one; the index comes last.

    Args:
        folder: of the model; it is made if it is not there.
        limit: bytes of a file. A larger tensor gets one of its own.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """The next tensors by the names that they have in files. They must stay as they are until they are written."""
        for name, tensor in tensors.items():
            if self._held and _size(self._held) + tensor.nbytes > self._limit:
                self._write()
            self._held[name] = tensor.contiguous()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        if fault[0] is None:
            self._close()

    def _write(self) -> None:
        self._bytes += _size(self._held)
        self._files.append(list(self._held))
        save_file(self._held, self._folder / _part(len(self._files)), metadata={"format": "pt"})
        self._held = {}

    def _close(self) -> None:
        """Only now it is known of how many files each is one, which is a part of their names."""
        if self._held:
            self._write()
        count = len(self._files)
        if count == 1:
            (self._folder / _part(1)).rename(self._folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._folder / _part(number)).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
