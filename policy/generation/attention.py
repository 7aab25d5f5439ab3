"""Attention while rows are written: one new token for each, whose query heads may share keys."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models.kernels import exact_attention


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
def sampling_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend inside the block as it is best for rows that are written token by token.

    Where it has "sdpa", that is :func:`grouped_sdpa`: the function changes and not its name, as there are models whose
    code asks whether the name is "sdpa". Flash attention unpads a padded batch anew in each layer and for each token,
    and waits for the host to know how many tokens there are; SDPA takes its place.
    """
    configs: dict[int, Any] = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    with_flash = {
        key: name
        for key, config in configs.items()
        if "flash" in (name := str(getattr(config, "_attn_implementation", None) or ""))
    }
    functions = ALL_ATTENTION_FUNCTIONS
    functions["sdpa"] = grouped_sdpa
    try:
        for key in with_flash:
            configs[key]._attn_implementation_internal = exact_attention(configs[key]) or "sdpa"
        yield
    finally:
        for key, name in with_flash.items():
            configs[key]._attn_implementation_internal = name
        del functions["sdpa"]  # the one of Transformers is there again
