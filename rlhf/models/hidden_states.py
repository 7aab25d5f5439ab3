"""Last hidden states of a causal model for several blocks of rows at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.core.packing import PackedRows


def last_states(model: PreTrainedModel, blocks: Sequence[Tensor | PackedRows]) -> Iterator[Tensor]:
    """``(R, T, D)`` states of the last layer for each block of rows: ``(R, T)`` right-padded tokens, or packed rows.

    A causal model never looks right, so right padding needs no mask: attention kernels are faster without. In training
    all blocks share one call of the embedding: the gradient of each call is as large as the whole table.
    """
    backbone = backbone_of(model)
    tokens = [block.tokens if isinstance(block, PackedRows) else block for block in blocks]
    inputs: list[dict[str, Tensor]] = [{"input_ids": each} for each in tokens]
    if len(blocks) > 1 and _trains_plain_embedding(backbone):
        embedded = backbone.get_input_embeddings()(torch.cat([each.flatten() for each in tokens]))
        parts = embedded.split([each.numel() for each in tokens])
        inputs = [{"inputs_embeds": part.view(*each.shape, -1)} for each, part in zip(tokens, parts, strict=True)]
    for block, own in zip(blocks, inputs, strict=True):
        if isinstance(block, PackedRows):
            mask = _attention_mask(block, model)
            states = backbone(**own, attention_mask=mask, position_ids=block.positions, use_cache=False)
            yield block.unpacked(states.last_hidden_state)
        else:
            yield backbone(**own, use_cache=False).last_hidden_state


def _attention_mask(rows: PackedRows, model: PreTrainedModel) -> Tensor:
    """What tokens see, as the model's attention takes it: truths, or numbers that are added to attention scores."""
    visible = rows.visible()
    if model.config._attn_implementation == "sdpa":
        return visible
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(visible.shape, dtype=model.dtype, device=visible.device).masked_fill(~visible, lowest)


def backbone_of(model: PreTrainedModel) -> Any:
    """The part of a model below its head; some (Llama 4) do not name it as Transformers does elsewhere."""
    return model.base_model if model.base_model is not model else model.get_submodule("model")


def _trains_plain_embedding(backbone: Any) -> bool:
    """Some models (Gemma 3n) look tokens up in every layer, and need them there."""
    trained = torch.is_grad_enabled() and backbone.get_input_embeddings().weight.requires_grad
    return bool(trained) and not getattr(backbone.config, "hidden_size_per_layer_input", 0)
