"""Last hidden states of a causal model for several blocks of rows at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.core.packing import Packing
from rlhf.models.packed_attention import kernel_of, packed


def last_states(model: PreTrainedModel, blocks: Sequence[Tensor], packing: Packing | None = None) -> Iterator[Tensor]:
    """``(R, T, D)`` states of the last layer for each ``(R, T)`` block of right-padded token rows.

    A causal model never looks right, so right padding needs no mask: attention kernels are faster without. In training
    all blocks share one call of the embedding: the gradient of each call is as large as the whole table.

    Args:
        model: whose backbone is asked.
        blocks: of token rows.
        packing: of these blocks; a model that takes packed sequences is asked about it instead.
    """
    backbone = backbone_of(model)
    kernel = None if packing is None else kernel_of(model)
    if packing is not None and kernel is not None:
        yield from _packed_states(backbone, packing.padded() if kernel == "flex" else packing)
        return
    if len(blocks) < 2 or not _trains_plain_embedding(backbone):
        for tokens in blocks:
            yield backbone(input_ids=tokens, use_cache=False).last_hidden_state
        return
    embedded = backbone.get_input_embeddings()(torch.cat([tokens.flatten() for tokens in blocks]))
    parts = embedded.split([tokens.numel() for tokens in blocks])
    for tokens, part in zip(blocks, parts, strict=True):
        yield backbone(inputs_embeds=part.view(*tokens.shape, -1), use_cache=False).last_hidden_state


def _packed_states(backbone: Any, packing: Packing) -> Sequence[Tensor]:
    with packed(packing):
        states = backbone(
            input_ids=packing.tokens[None],
            # All are real. Without a mask Transformers would look for rows in the positions.
            attention_mask=torch.ones_like(packing.tokens)[None],
            position_ids=packing.positions[None],
            use_cache=False,
        ).last_hidden_state
    return packing.blocks(packing.spread(states[0, : len(packing.first)]))


def backbone_of(model: PreTrainedModel) -> Any:
    """The part of a model below its head; some (Llama 4) do not name it as Transformers does elsewhere."""
    return model.base_model if model.base_model is not model else model.get_submodule("model")


def _trains_plain_embedding(backbone: Any) -> bool:
    """Some models (Gemma 3n) look tokens up in every layer, and need them there."""
    trained = torch.is_grad_enabled() and backbone.get_input_embeddings().weight.requires_grad
    return bool(trained) and not getattr(backbone.config, "hidden_size_per_layer_input", 0)
