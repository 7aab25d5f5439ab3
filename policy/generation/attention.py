"""Attention of one new token for models whose query heads share keys, without a copy of the keys for each head."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' "sdpa", with the heads of a group as the query places of one head.

    For a masked batch Transformers first repeats keys and values for each query head. With a single new token
    that costs more than the attention itself. H query heads that share G heads of keys, as rows of a
    ``(B, G, H / G, D)`` query, ask the same without a copy: a single token needs no causal order.

    Args:
        query: ``(B, H, T, D)``.
        key, value: ``(B, G, S, D)``.
        attention_mask: ``(B, 1, T, S)`` or ``None``.
    Returns:
        ``(B, T, H, D)``, and no attention weights.
    """
    rows, heads, new, width = query.shape
    groups = key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if new != 1 or heads == groups or not one_mask or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    folded = query.reshape(rows, groups, heads // groups, width)
    found = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return found.reshape(rows, 1, heads, found.shape[-1]), None


@contextlib.contextmanager
def grouped_attention() -> Iterator[None]:
    """Let models that attend by Transformers' "sdpa" do it by :func:`grouped_sdpa` inside the block.

    The function changes and not its name: there are models whose code asks whether the name is "sdpa".
    """
    functions = ALL_ATTENTION_FUNCTIONS
    functions["sdpa"] = grouped_sdpa
    try:
        yield
    finally:
        del functions["sdpa"]  # the one of Transformers is there again
