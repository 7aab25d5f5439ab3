"""Folders that hold a LoRA adapter and name the model that it belongs to."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.core.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterBase(NamedTuple):
    """The model that an adapter belongs to."""

    path: str
    """Folder or name on the hub."""
    revision: str | None


def adapter_base(path: str | Path) -> AdapterBase | None:
    """What the adapter in the folder ``path`` was trained on; ``None`` if there is no adapter.

    Raises:
        ModelError: if the adapter names a folder that is not here.
    """
    folder = Path(path)
    if not (folder / SETTINGS).is_file() or (folder / "config.json").is_file():
        return None
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    base = str(settings.get("base_model_name_or_path") or "")
    looks_like_a_folder = base.startswith((".", "/", "~")) or base.count("/") != 1
    if not base or (looks_like_a_folder and not Path(base).expanduser().is_dir()):
        raise ModelError(
            f"{folder} is an adapter of the model {base or 'that its adapter_config.json does not name'}, which is not "
            "here: write the folder of that model as base_model_name_or_path into its adapter_config.json"
        )
    there = Path(base).expanduser()
    return AdapterBase(str(there) if there.is_dir() else base, settings.get("revision"))


def holder_of(files: Sequence[str], path: str | Path, revision: str | None) -> tuple[str, str | None]:
    """Folder or name, and revision, of the model whose ``files`` hold for ``path``.

    That is the base of an adapter which brings none of them, as peft leaves it.
    """
    base = adapter_base(path)
    if base is None or any((Path(path) / name).is_file() for name in files):
        return str(path), revision
    return base.path, base.revision


def absolute_base(path: str) -> str:
    """The name under which an adapter's base is found from anywhere."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def saved_embedding_rows(folder: Path) -> int | None:
    """Rows of the embedding that is saved with the adapter; ``None`` without one."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if "lora_" not in name and name.endswith(".weight")]  # noqa: SIM118
        shapes = [file.get_slice(name).get_shape() for name in names]
    return max((shape[0] for shape in shapes if len(shape) == 2), default=None)


def with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``model`` with the adapter of ``folder`` merged into its weights, in place.

    Raises:
        ModelError: if the adapter does not fit.
    """
    merge_adapters(beside_adapter(model, folder))
    return model.requires_grad_(True)  # peft had frozen it


def beside_adapter(model: PreTrainedModel, folder: Path) -> "PeftModel":
    """The adapter of ``folder`` put into ``model``, in place, whose own weights stay as and where they are.

    Raises:
        ModelError: if the adapter does not fit.
    """
    from peft import PeftModel

    rows = saved_embedding_rows(folder)
    if rows is not None:
        model.resize_token_embeddings(rows)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, UserWarning) as error:
        raise ModelError(f"{folder}: the adapter does not fit {type(model).__name__}: {error}") from error


def merge_adapters(wrapped: "PeftModel") -> None:
    """Put adapters into the weights of the wrapped model; computed in float32 and rounded once."""
    for layer in adapted_layers(wrapped):
        merge_adapter(layer)
    take_off(wrapped)


def adapted_layers(wrapped: "PeftModel") -> list[Any]:
    """The layers that have an adapter."""
    from peft.tuners.lora import LoraLayer

    return [module for module in wrapped.modules() if isinstance(module, LoraLayer)]


def merge_adapter(layer: Any) -> None:
    """Put the adapter of one layer into its weight."""
    layer.get_base_layer().weight.data = merged_weight(layer)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight of a layer with its adapter in it, computed in float32 and rounded once. The layer stays as it is."""
    weight = layer.get_base_layer().weight
    before = {parameter: parameter.data for parameter in layer.parameters()}
    wide = torch.promote_types(weight.dtype, torch.float32)
    try:
        for parameter, data in before.items():
            parameter.data = data.to(wide, copy=parameter is weight)
        layer.merge()
        return weight.data.to(before[weight].dtype)
    finally:
        for parameter, data in before.items():
            parameter.data = data
        layer.merged_adapters.clear()


def mark_merged(layer: Any, merged: bool) -> None:
    """Let a layer go by its weight alone, which has the adapter in it, or by both again."""
    layer.merged_adapters[:] = layer.active_adapters if merged else []


@contextlib.contextmanager
def merged(layers: Sequence[Any]) -> Iterator[None]:
    """The adapters of ``layers`` are in their weights inside the block, and apart again behind it.

    The weights are then the very tensors that they were: what is merged lies beside them.
    """
    before: dict[Any, Tensor] = {}
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            before[weight] = weight.data
            weight.data = merged_weight(layer)
            mark_merged(layer, True)
        yield
    finally:
        for weight, data in before.items():
            weight.data = data
        for layer in layers:
            mark_merged(layer, False)


def take_off(wrapped: "PeftModel") -> None:
    """Leave the layers as they were before, with the weights that they have now."""
    model: Any = wrapped.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config  # it may be adapted anew
