"""What of a loaded model is trained: layers, or adapters above frozen ones."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.core.errors import ModelError
from rlhf.core.heads import HEAD_NAMES
from rlhf.models.kernels import checkpoint_activations
from rlhf.models.options import BackboneConfig, LoraOptions

if TYPE_CHECKING:
    from peft import PeftModel

EMBEDDING_NAMES = ("emb", "wte", "wpe", "position", "project_in")
"""Parts of the names of parameters below the layers; Transformers has no common name for them."""


def make_trainable(model: PreTrainedModel, config: BackboneConfig, dtype: torch.dtype) -> "PeftModel | None":
    """Freeze, adapt and checkpoint a loaded model, in place, as ``config`` says.

    Args:
        model: loaded.
        config: what of it is trained.
        dtype: that the weights are going to have; new ones are made so.
    Returns:
        The peft wrapper of the adapters, if the recipe has them: keep it to merge them later.
    """
    adapter = None
    if config.lora is not None:
        adapter = add_lora(model, config.lora, freeze_layers=config.freeze_layers, dtype=dtype)
    else:
        freeze_lower_layers(model, config.freeze_layers)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return adapter


def freeze_lower_layers(model: PreTrainedModel, count: int) -> None:
    """No gradient for the first ``count`` layers and what comes before them: embeddings, of places too, and norms."""
    if count == 0:
        return
    layers = decoder_layers(model)
    if count > len(layers):
        raise ModelError(f"model.freeze_layers = {count}, but the model has {len(layers)} layers")
    model.get_input_embeddings().requires_grad_(False)
    in_layers = {id(parameter) for parameter in layers.parameters()}
    for name, parameter in model.base_model.named_parameters():
        if id(parameter) not in in_layers and any(part in name.lower() for part in EMBEDDING_NAMES):
            parameter.requires_grad_(False)
    for layer in layers[:count]:
        layer.requires_grad_(False)


def add_lora(
    model: PreTrainedModel, options: LoraOptions, *, freeze_layers: int, dtype: torch.dtype | None = None
) -> "PeftModel":
    """Put adapters into ``model`` (in place) above the frozen layers; everything else but the head is frozen.

    Args:
        model: loaded.
        options: of the adapters.
        freeze_layers: layers that get none.
        dtype: that the weights are going to have; ``None``: that they have.
    Returns:
        The peft wrapper: keep it to merge the adapters later.
    """
    from peft import LoraConfig, get_peft_model

    count = len(decoder_layers(model))
    above = list(range(freeze_layers, count)) if freeze_layers else None
    heads = [name for name in HEAD_NAMES if hasattr(model, name)]
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft says int, and divides by the rank: any number
        lora_dropout=options.dropout,
        target_modules=options.targets,
        exclude_modules=heads if heads and options.targets == "all-linear" else None,
        layers_to_transform=None if options.targets == "all-linear" else above,
    )
    try:
        with shown_as(model, dtype):
            wrapped = get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"model.lora.targets = {options.targets}: {error}") from error
    freeze_adapters_below(model, freeze_layers)
    return wrapped


@contextlib.contextmanager
def shown_as(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Weights appear to have the type ``dtype`` inside the block, which reads nothing but types and shapes of them."""
    weights = {parameter: parameter.data for parameter in model.parameters() if dtype not in (None, parameter.dtype)}
    for parameter, data in weights.items():
        parameter.data = torch.zeros((), dtype=dtype).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data


def freeze_adapters_below(model: PreTrainedModel, count: int) -> None:
    """``all-linear`` puts adapters everywhere; those of frozen layers stay at zero and cost no gradient."""
    for layer in decoder_layers(model)[:count]:
        layer.requires_grad_(False)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of layers, found by its length."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(model).__name__}: no stack of {count} layers found; freeze_layers cannot be used with it")
