"""Tokens from logits by inverse CDF: one uniform number gives one token, in the order of the vocabulary."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # tokens of the vocabulary whose probabilities are added up before the sums are accumulated
FIRST_NUCLEUS = 256


class Drawn(NamedTuple):
    """One token for each of B rows."""

    tokens: Tensor
    """``(B,)`` int64 token ids."""
    logprobs: Tensor
    """``(B,)`` float32 log-probabilities in nats under the tempered distribution, before top_k and top_p."""
    entropies: Tensor
    """``(B,)`` float32 entropies of that distribution in nats."""


def draw_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float) -> Drawn:
    r"""Draw one token from each row.

        p = softmax(logits / temperature);  q = p on the top_k likeliest tokens, then on the fewest of these
        that have top_p of their mass, and 0 elsewhere;  token = min { v : q_0 + ... + q_v > u (q_0 + ... + q_V) }

    Nothing is sorted unless ``top_k`` or ``top_p`` ask for it. A token of probability 0 is never drawn.

    Args:
        logits: ``(B, V)`` float32.
        uniforms: ``(B,)`` float64 in [0, 1).
        temperature: > 0.
        top_k: 0 for all tokens. Of equal logits, exactly as many are kept as there is room for.
        top_p: 0 < top_p <= 1; 1 for all tokens.
    """
    vocabulary = logits.shape[1]
    # A token that a model rules out (-inf) counts for 0 in the entropy, too: 0 times a finite number.
    tempered = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).clamp_min_(torch.finfo(logits.dtype).min)
    weights = tempered.exp()
    everything = top_p == 1.0 and not 0 < top_k < vocabulary
    kept = weights if everything else _likeliest(weights, top_k, top_p)
    blocks, cumulative = _block_sums(kept)
    tokens = _inverse_cdf(blocks, cumulative, uniforms).clamp_max(vocabulary - 1)
    total = cumulative[:, -1] if kept is weights else weights.sum(dim=-1, dtype=torch.float64)
    normalizers = total.log()
    logprobs = tempered.gather(1, tokens[:, None]).squeeze(1) - normalizers
    entropies = normalizers - torch.linalg.vecdot(weights, tempered) / total
    return Drawn(tokens, logprobs.float(), entropies.float())


def _likeliest(weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """``weights`` where a token may be drawn, else 0."""
    vocabulary = weights.shape[1]
    if 0 < top_k < vocabulary:
        values, places = weights.topk(top_k)
        values = values * _in_nucleus(values, values.sum(dim=-1, keepdim=True, dtype=torch.float64), top_p)
    else:
        values, places = _nucleus(weights, top_p)
    return torch.zeros_like(weights).scatter_(1, places, values)


def _nucleus(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Weights (0 outside the nucleus) and tokens of the likeliest so many tokens: enough to hold every nucleus."""
    total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    width = min(FIRST_NUCLEUS, weights.shape[1])
    while True:
        values, places = weights.topk(width)
        enough = values.sum(dim=-1, keepdim=True, dtype=torch.float64) >= top_p * total
        if width == weights.shape[1] or bool(enough.all()):
            return values * _in_nucleus(values, total, top_p), places
        width = min(8 * width, weights.shape[1])


def _in_nucleus(values: Tensor, total: Tensor, top_p: float) -> Tensor:
    """``(B, n)`` bool: the tokens before this one, of descending ``values``, have less than ``top_p``."""
    before = values.double().cumsum(dim=-1) - values
    return before < top_p * total


def _block_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, n, BLOCK)`` weights and ``(B, n)`` float64 cumulative sums of the blocks.

    Accumulating blocks first is one fast pass; accumulating a whole vocabulary in float32 would lose digits.
    """
    missing = -weights.shape[1] % BLOCK
    padded = F.pad(weights, (0, missing)) if missing else weights
    blocks = padded.view(len(weights), -1, BLOCK)
    return blocks, blocks.sum(dim=-1).double().cumsum(dim=-1)


def _inverse_cdf(blocks: Tensor, cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """First the block, then the token in it."""
    block, before = _first_above(cumulative, uniforms * cumulative[:, -1])
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double().cumsum(dim=-1)
    place, _ = _first_above(inside, uniforms * cumulative[:, -1] - before)
    return block * BLOCK + place


def _first_above(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First place ``(B,)`` whose cumulative sum passes ``target``, and the sum before it.

    ``target`` is kept in [0, total): so there is such a place, and its own summand is not 0. Only sums that are
    not a number have none; the place is then the last one, and the log-probability tells.
    """
    total = cumulative[:, -1]
    target = torch.minimum(target.clamp_min(0.0), torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, target[:, None], right=True).clamp_max_(cumulative.shape[1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(1, place)
    return place.squeeze(1), before.squeeze(1)
