"""A model folder's weights, written file by file as they come: nobody needs to hold all of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlhf.core.errors import ModelError
from rlhf.core.memory import free_memory

SHARD_BYTES = 5 * 10**9
"""Size of a file, as the hub has had it for years: little beside any host that trains a model of several."""
MEMORY_SHARE = 20
"""A file is of this part of the free memory at most: what goes into it is held until it is written."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def fitting_bytes() -> int:
    """Size of a file that the memory of this host has room for."""
    free = free_memory()
    return SHARD_BYTES if free is None else min(SHARD_BYTES, free // MEMORY_SHARE)


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

    def close(self) -> None:
        """Write the rest. Only now it is known of how many files each is one, which is a part of their names."""
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        if fault[0] is None:
            self.close()

    def _write(self) -> None:
        self._bytes += _size(self._held)
        self._files.append(list(self._held))
        save_file(self._held, self._folder / _part(len(self._files)), metadata={"format": "pt"})
        self._held = {}


class ModelWriter:
    """Writes the weights of a Transformers model, in any order, as ``save_pretrained`` writes them at once.

    Names and shapes in files may be others than in the model (fused experts): a layer is turned back when all of it has
    come.

    Args:
        model: plain, with weights of the right shapes; what they are is of no interest.
        folder: where to.
        limit: bytes of a file.
    Raises:
        ModelError: if what files have for this model cannot be made layer by layer.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, limit: int = SHARD_BYTES) -> None:
        self._model, self._writer = model, ShardWriter(folder, limit)
        ignored = model._keys_to_ignore_on_save or ()
        whole = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        shapes = {name: torch.empty_like(value, device="meta") for name, value in whole.items() if name not in ignored}
        self._missing: dict[str, set[str]] = {}
        for name in shapes:
            self._missing.setdefault(_layer(name), set()).add(name)
        self._held: dict[str, dict[str, Tensor]] = {layer: {} for layer in self._missing}
        expected = _shapes(revert_weight_conversion(model, shapes))
        found: dict[str, torch.Size] = {}
        for names in self._missing.values():
            found |= _shapes(revert_weight_conversion(model, {name: shapes[name] for name in names}))
        self._as_in_files = expected == _shapes(shapes)
        if found != expected:
            odd = sorted({*found.items()} ^ {*expected.items()})[:3]
            raise ModelError(f"{type(model).__name__}: its files mix layers ({odd}), and cannot be written one by one")

    @property
    def names(self) -> frozenset[str]:
        """Weights of the model that are yet to come."""
        return frozenset(name for names in self._missing.values() for name in names)

    def add(self, name: str, value: Tensor) -> None:
        """One weight on the CPU, by its name in the model."""
        layer = _layer(name)
        self._missing[layer].remove(name)
        if self._as_in_files:
            self._writer.add({name: value})
            return
        self._held[layer][name] = value
        if not self._missing[layer]:
            self._writer.add(revert_weight_conversion(self._model, self._held.pop(layer)))

    def close(self) -> None:
        """Raises ModelError: if a weight has not come."""
        if self.names:
            raise ModelError(f"{type(self._model).__name__}: no values for {sorted(self.names)[:3]}")
        self._writer.close()


def _layer(name: str) -> str:
    """``model.layers.7`` of whatever is in that layer; what is in none stands for itself."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])


def _shapes(tensors: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
