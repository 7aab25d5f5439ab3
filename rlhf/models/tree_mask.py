"""The mask of FlexAttention for a packed sequence, whose rows are a tree of beginnings that they share.

What follows a token in some row stands between it and the end of its branch: so a branch is its own past, and one
number a token tells who sees it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import causal_mask_function

from rlhf.core.packing import BLOCK, Packing


def tree_mask(packing: Packing, asked: dict[str, Any]) -> BlockMask:
    """The mask that layers of one kind have for ``packing``: that which Transformers ``asked`` for, of each row."""
    plain, positions, ends = asked["mask_function"], packing.positions, packing.ends
    for part in (positions, ends):
        may_change(part, 0)

    def sees_past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    def sees_some(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees_past(batch, head, query, key) & plain(batch, head, positions[query], positions[key])

    if plain is causal_mask_function:
        return _blocks(packing, sees_past)
    reach = asked.get("local_size") if asked.get("allow_is_causal_skip", True) else None  # else it sees more, too
    return _blocks(packing, sees_some, all_of_past=False, reach=reach)


def may_change(values: Tensor, dimension: int) -> None:
    """Let one kernel do for all lengths from the start: else the first is built for the first length alone."""
    torch._dynamo.maybe_mark_dynamic(values, dimension)


def _blocks(
    packing: Packing, sees: Callable[..., Tensor], *, all_of_past: bool = True, reach: int | None = None
) -> BlockMask:
    """Which blocks of tokens see which, from the ends of branches alone.

    PyTorch's own way asks about each pair of tokens, and builds kernels for that before the first step.

    Args:
        sees: whether a token sees another.
        all_of_past: whether each token sees its whole past, so that ``sees`` need not be asked within some blocks.
        reach: how many positions a token looks back at most; blocks that are further apart are left out.
    """
    ends, positions = packing.ends, packing.positions
    count = -(-len(ends) // BLOCK)
    missing = count * BLOCK - len(ends)
    begins = torch.arange(count, device=ends.device) * BLOCK
    end = F.pad(ends, (0, missing)).view(count, BLOCK)
    is_past = begins[:, None] > begins  # (queries, keys)
    seen = is_past & (end.amax(dim=1) > begins[:, None])
    if reach is not None:
        place = positions[torch.arange(count * BLOCK, device=ends.device).clamp_max(len(ends) - 1)].view(count, BLOCK)
        seen &= place.amin(dim=1)[:, None] - place.amax(dim=1) <= reach
    seen |= torch.eye(count, dtype=torch.bool, device=ends.device)
    wholly = is_past & (end.amin(dim=1) >= begins[:, None] + BLOCK) & all_of_past
    sizes: dict[str, Any] = {"BLOCK_SIZE": BLOCK, "mask_mod": sees, "seq_lengths": (len(ends), len(ends))}
    mask = _TreeMask.from_kv_blocks(*_in_order(seen & ~wholly), *_in_order(wholly), **sizes)
    mask.ends = ends
    for part in vars(mask).values():
        if isinstance(part, Tensor):
            for dimension in range(2, part.dim()):
                may_change(part, dimension)
    return mask


class _TreeMask(BlockMask):
    """A mask whose length is that of a tensor: a number in its place would have a kernel of its own at first."""

    ends: Tensor

    @property
    def seq_lengths(self) -> tuple[int, int]:
        return len(self.ends), len(self.ends)

    @seq_lengths.setter
    def seq_lengths(self, lengths: tuple[int, int]) -> None:
        """Given by ``ends``."""


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``(1, 1, B)`` counts and ``(1, 1, B, B)`` columns of the true places of each row, which come first."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
