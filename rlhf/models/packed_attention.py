"""Attention over a packed sequence, for any family that takes its attention from Transformers' interface.

All that a model does token by token (projections, MLPs, norms: nearly all of its work) runs on the packed sequence, in
which nothing is padding and a shared beginning stands once. Attention has a kernel of its own:

* ``flex``, on GPUs: FlexAttention over the whole sequence. Its mask lets each token see its own past and no other
  row's, as the mask that Transformers makes for such a layer has it at their positions: sliding windows and chunks are
  those of rows. Where no row begins like another and the model has flash-attn, that attends to the rows by their
  lengths.
* ``rows``: queries, keys and values are laid out as blocks of rows, attended by the model's own attention with the mask
  that Transformers makes for such rows, and put back.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.core.moving import moved
from rlhf.core.packing import Packing
from rlhf.models.tree_mask import may_change, tree_mask

PREFIX = "packed_"
Kernel = Literal["flex", "rows"]
PLAIN = ("sdpa", "eager")
"""Attention of Transformers that can be asked about blocks of rows."""
FLASH = ("flash_attention_2", "flash_attention_3")
"""Attention of Transformers that takes the lengths of rows."""
FLEX = "flex_attention"
KERNELS = 64
"""How many of FlexAttention may be built in a run."""

_current: ContextVar[Packing | None] = ContextVar("packing", default=None)
_comparison: ContextVar["Comparison | None"] = ContextVar("comparison", default=None)


@dataclass(frozen=True)
class PackedMask:
    """What the layers are given as their mask.

    Layers that are computed again in the backward pass get it again, when :func:`packed` is long left.
    """

    packing: Packing
    masks: tuple[Any, ...]
    """One for each block of rows, or one for the whole sequence; for rows by their lengths, where they begin."""
    attend: Callable[..., Tensor]
    """Gives ``(1, N, H, D)`` from module, queries, keys, values, this mask and the options of the layer."""
    rows: "PackedMask | None" = None
    """The same row by row, to compare with; see :func:`comparing`."""


def kernels_for(model: PreTrainedModel, device: torch.device) -> tuple[Kernel, ...]:
    """What ``model`` could attend to packed rows with on ``device``, the fastest first."""
    name = _plain_name(str(model.config._attn_implementation))
    flex: tuple[Kernel, ...] = ("flex",) if device.type == "cuda" and name in (*PLAIN, *FLASH) else ()
    return (*flex, "rows") if name in PLAIN else flex


def kernel_of(model: PreTrainedModel) -> Kernel | None:
    """What ``model`` attends to packed sequences with; ``None`` for one that takes none."""
    name = str(model.config._attn_implementation)
    return next((kernel for kernel in ("flex", "rows") if name.startswith(f"{PREFIX}{kernel}_")), None)


def set_packing(model: PreTrainedModel, kernel: Kernel | None) -> bool:
    """Let ``model`` take packed sequences beside ordinary rows, or no longer; whether it takes them now."""
    if kernel == "flex":
        _let_kernels_be_many()
    settings = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    for config in settings.values():
        plain = _plain_name(getattr(config, "_attn_implementation", None) or "")
        name = f"{PREFIX}{kernel}_{plain}"
        if kernel is None or name in ALL_ATTENTION_FUNCTIONS:
            config._attn_implementation_internal = plain if kernel is None else name
    return kernel_of(model) is not None


def _let_kernels_be_many() -> None:
    """Dynamo takes 8 kernels of a function for a fault, and has it run as it is from then on: FlexAttention would hold
    all scores. Each shape of a model has its own, with and without gradients, and a run has several models.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)


@contextlib.contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """A model that is asked inside the block is given the packed sequence of ``packing``."""
    token = _current.set(packing)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class Comparison:
    """How far packed attention is from attention row by row."""

    gradients: bool
    """Whether gradients are compared, too: kernels for them take seconds to build, and a frozen model needs none."""
    recomputing: bool
    """Whether the model computes its activations again in the backward pass."""
    differences: list[float] = field(default_factory=list)
    """The largest of each layer's values and gradients, as a share of the largest of them."""


@contextlib.contextmanager
def comparing(*, gradients: bool, recomputing: bool) -> Iterator[list[float]]:
    """Packed attention inside the block is computed row by row as well, with gradients, even where the model has none.

    Gives the differences, see :class:`Comparison`; the list is filled inside the block.
    """
    found = Comparison(gradients, recomputing)
    token = _comparison.set(found)
    try:
        yield found.differences
    finally:
        _comparison.reset(token)


def _plain_name(name: str) -> str:
    kernel = next((kernel for kernel in ("flex", "rows") if name.startswith(f"{PREFIX}{kernel}_")), None)
    return name if kernel is None else name.removeprefix(f"{PREFIX}{kernel}_")


def _mask_of(kernel: Kernel, name: str) -> Callable[..., Any]:
    """What makes the mask: once for each kind of layer, before the first layer."""

    def make(**asked: Any) -> Any:
        packing = _current.get()
        if packing is None:
            return ALL_MASK_ATTENTION_FUNCTIONS[name](**asked)
        row_by_row = name if name in PLAIN else "eager"
        if kernel == "rows":
            return _mask_of_rows(row_by_row, packing, asked)
        rows = None if _comparison.get() is None else _mask_of_rows(row_by_row, packing, asked)
        if packing.lengths and name in FLASH:
            return _mask_of_lengths(name, packing, rows, asked["device"])
        return _mask_of_tree(packing, rows, asked)

    return make


def _mask_of_rows(name: str, packing: Packing, asked: dict[str, Any]) -> PackedMask:
    masks = []
    for rows, width in packing.shapes:
        # Rows are padded on the right: a causal mask hides that already.
        sizes = {"batch_size": rows, "q_length": width, "kv_length": width, "attention_mask": None}
        masks.append(ALL_MASK_ATTENTION_FUNCTIONS[name](**{**asked, **sizes}))

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, **options: Any
    ) -> Tensor:
        # (1, H, N, D) to (R, H, T, D) of each block, and back from (R, T, H, D).
        count = len(packing.first)
        spread = (packing.blocks(packing.spread(part[0, :, :count].transpose(0, 1))) for part in (query, key, value))
        found = [
            _plain_attention(name, module)(module, *(part.transpose(1, 2) for part in block), own, **options)[0]
            for *block, own in zip(*spread, mask.masks, strict=True)
        ]
        return packing.collect(torch.cat([part.flatten(0, 1) for part in found]))[None]

    return PackedMask(packing, tuple(masks), attend)


def _mask_of_tree(packing: Packing, rows: PackedMask | None, asked: dict[str, Any]) -> PackedMask:
    mask = tree_mask(packing, asked)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, **options: Any
    ) -> Tensor:
        heads, groups = query.shape[1], key.shape[1]
        if heads & (heads - 1) and heads != groups:  # Transformers would repeat them, into tensors that are not marked
            key, value = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
        for part in (query, key, value):
            may_change(part, 2)
        return ALL_ATTENTION_FUNCTIONS[FLEX](module, query, key, value, mask.masks[0], **options)[0]

    return PackedMask(packing, (mask,), attend, rows)


def _mask_of_lengths(name: str, packing: Packing, rows: PackedMask | None, device: torch.device) -> PackedMask:
    starts = torch.tensor([0, *itertools.accumulate(packing.lengths)], dtype=torch.int32)
    starts, longest = moved(starts, device), max(packing.lengths)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, **options: Any
    ) -> Tensor:
        lengths = {"max_length_q": longest, "max_length_k": longest}
        begins = {"cu_seq_lens_q": mask.masks[0], "cu_seq_lens_k": mask.masks[0]}
        return _flash(name, module, query, key, value, None, **{**options, **lengths, **begins})[0]

    return PackedMask(packing, (starts,), attend, rows)


def _attention_of(name: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, PackedMask):
            if name in FLASH:
                return _flash(name, module, query, key, value, attention_mask, **options)
            return _plain_attention(name, module)(module, query, key, value, attention_mask, **options)
        options.pop("position_ids", None)  # those of the packed sequence: some kernels read them as rows of their own
        if attention_mask.rows is not None:
            _compare(module, (query, key, value), attention_mask, options)
        return attention_mask.attend(module, query, key, value, attention_mask, **options), None

    return attend


def _compare(module: nn.Module, inputs: tuple[Tensor, ...], mask: PackedMask, options: dict[str, Any]) -> None:
    """Note how far a kernel is from attention row by row."""
    comparison, both = _comparison.get(), []
    assert comparison is not None and mask.rows is not None
    count = len(mask.packing.first)
    for way in (mask, mask.rows):
        with torch.set_grad_enabled(comparison.gradients):
            parts = [part.detach().clone().requires_grad_(comparison.gradients) for part in inputs]
            asked = functools.partial(way.attend, mask=way, **options)
            if comparison.recomputing:
                values = checkpoint(asked, module, *parts, use_reentrant=False)
            else:
                values = asked(module, *parts)
            values = values[:, :count].float()
            gradients: tuple[Tensor, ...] = ()
            if comparison.gradients:
                gradients = torch.autograd.grad((values * values.detach().cos()).sum(), parts)
        both.append([values.detach(), *(gradient[:, :, :count].float() for gradient in gradients)])
    comparison.differences.extend(
        float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)) for one, other in zip(*both, strict=True)
    )


def _plain_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """Eager attention is a function of each family's own file."""
    if name == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS[name]


def _flash(name: str, module: nn.Module, *inputs: Any, **options: Any) -> tuple[Tensor, Any]:
    """Transformers asks the settings of the module which of its flash attentions is meant."""
    settings: Any = module.config
    before = settings._attn_implementation_internal
    settings._attn_implementation_internal = name
    try:
        return ALL_ATTENTION_FUNCTIONS[name](module, *inputs, **options)
    finally:
        settings._attn_implementation_internal = before


for _name in (*PLAIN, *FLASH):
    for _kernel in ("flex", "rows") if _name in PLAIN else ("flex",):
        ALL_ATTENTION_FUNCTIONS.register(f"{PREFIX}{_kernel}_{_name}", _attention_of(_name))
        ALL_MASK_ATTENTION_FUNCTIONS.register(f"{PREFIX}{_kernel}_{_name}", _mask_of(_kernel, _name))
