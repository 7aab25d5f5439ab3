"""Attention over a packed sequence, for any family that takes its attention from Transformers' interface.

All that a model does token by token (projections, MLPs, norms: nearly all of its work) runs on the packed sequence, in
which nothing is padding and a shared beginning stands once. Attention alone needs rows: queries, keys and values are
laid out as blocks of rows, attended by the model's own attention with the mask that Transformers makes for such rows,
and put back. So sliding windows, soft-capping, grouped heads and sinks are what they are without packing.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.core.packing import Packing

PREFIX = "packed_"
PLAIN = ("sdpa", "eager")
"""Attention of Transformers that can be asked about blocks of rows."""

_current: ContextVar[Packing | None] = ContextVar("packing", default=None)


@dataclass(frozen=True)
class PackedMask:
    """What the layers are given as their mask: the packing, and the mask of each block of rows.

    Layers that are computed again in the backward pass get it again, when :func:`packed` is long left.
    """

    packing: Packing
    masks: tuple[Tensor | None, ...]


def packs(model: PreTrainedModel) -> bool:
    """Whether packed sequences may be given to ``model``."""
    return str(model.config._attn_implementation).startswith(PREFIX)


def set_packing(model: PreTrainedModel, wanted: bool) -> bool:
    """Let ``model`` take packed sequences beside ordinary rows, or no longer; whether it takes them now."""
    settings = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    for config in settings.values():
        name = getattr(config, "_attn_implementation", None) or ""
        if wanted and name in PLAIN:
            config._attn_implementation_internal = PREFIX + name
        elif not wanted and name.startswith(PREFIX):
            config._attn_implementation_internal = name.removeprefix(PREFIX)
    return packs(model)


@contextlib.contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """A model that is asked inside the block is given the packed sequence of ``packing``."""
    token = _current.set(packing)
    try:
        yield
    finally:
        _current.reset(token)


def _mask_of(name: str) -> Callable[..., Any]:
    """What makes the mask: once for each kind of layer, before the first layer."""

    def make(**asked: Any) -> Any:
        plain, packing = ALL_MASK_ATTENTION_FUNCTIONS[name], _current.get()
        if packing is None:
            return plain(**asked)
        masks = []
        for rows, width in packing.shapes:
            # Rows are padded on the right: a causal mask hides that already.
            sizes = {"batch_size": rows, "q_length": width, "kv_length": width, "attention_mask": None}
            masks.append(plain(**{**asked, **sizes}))
        return PackedMask(packing, tuple(masks))

    return make


def _attention_of(name: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        plain = _plain_attention(name, module)
        if not isinstance(attention_mask, PackedMask):
            return plain(module, query, key, value, attention_mask, **options)
        packing = attention_mask.packing
        options.pop("position_ids", None)  # those of the packed sequence: some kernels read them as rows of their own
        # (1, H, N, D) to (R, H, T, D) of each block, and back from (R, T, H, D).
        spread = (packing.blocks(packing.spread(part[0].transpose(0, 1))) for part in (query, key, value))
        found = [
            plain(module, *(part.transpose(1, 2) for part in block), mask, **options)[0].flatten(0, 1)
            for *block, mask in zip(*spread, attention_mask.masks, strict=True)
        ]
        return packing.collect(torch.cat(found))[None], None

    return attend


def _plain_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """Eager attention is a function of each family's own file."""
    if name == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS[name]


for _name in PLAIN:
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + _name, _attention_of(_name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + _name, _mask_of(_name))
