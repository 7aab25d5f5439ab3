"""Masks of token rows, made from lengths: never from token ids, as the padding id may be a real token's."""

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """``(B, width)`` bool, True on the first ``lengths[i]`` places of row i: tokens of right-padded rows.

    Raises:
        ValueError: if a length is negative or greater than ``width``.
    """
    if bool(((lengths < 0) | (lengths > width)).any()):
        raise ValueError(f"lengths must be in [0, {width}], not {lengths.tolist()}")
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def last_token_index(token_mask: Tensor) -> Tensor:
    """``(B,)`` int64 place of each row's last token, from a ``(B, T)`` bool mask padded on any side.

    Raises:
        ValueError: if the mask is not a bool matrix or a row has no token.
    """
    check_mask("token_mask", token_mask)
    empty = ~token_mask.any(dim=1)
    if bool(empty.any()):
        raise ValueError(f"rows without a token: {empty.nonzero().flatten().tolist()}")
    places = torch.arange(token_mask.shape[1], device=token_mask.device)
    return torch.where(token_mask, places, -1).amax(dim=1)


def check_mask(name: str, mask: Tensor) -> None:
    """Refuse what is not a ``(B, T)`` bool mask.

    Raises:
        ValueError: with the shape and type found; 0/1 integers would index, not select.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"'{name}' must be a (B, T) bool mask, not {tuple(mask.shape)} of {mask.dtype}")
