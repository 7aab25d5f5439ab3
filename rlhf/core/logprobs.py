"""Log-probabilities of responses under a language-model head, without a (rows, tokens, vocabulary) tensor."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.core.checks import check_positive, check_same_shape
from rlhf.core.masking import check_mask
from rlhf.core.packing import collect

CHUNK_TOKENS = 256
"""Places that are projected at once, unless their logits alone would take more than CHUNK_BYTES."""
CHUNK_BYTES = 256 * 2**20
BLOCK_BYTES = 64 * 2**20
"""How much of a weight in low precision, in float32, a CPU multiplies at once."""


class TokenLogprobs(NamedTuple):
    """What :func:`token_logprobs` says of B rows of T places; 0 at places outside the response."""

    logprobs: Tensor
    """``(B, T)`` log-probabilities in nats."""
    square_sums: Tensor | None
    """``(B, T)`` log of the sum over the vocabulary of squared probabilities, without gradient; if asked for."""
    entropies: Tensor | None
    """``(B, T)`` entropy of each distribution in nats, with gradient; if asked for."""


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    response_mask: Tensor,
    *,
    places: Tensor | None = None,
    head_bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    with_square_sums: bool = False,
    with_entropies: bool = False,
) -> TokenLogprobs:
    r"""Log-probability of each response token.

        logits_bt   = logit_scale (head_weight hidden_bt + head_bias);  softcap tanh(logits / softcap) if given
        logprobs_bt = log softmax(logits_bt / temperature)[targets_bt]   where response_mask_bt, else 0

    ``hidden[b, t]`` is what predicts ``targets[b, t]``: nothing is shifted here. With a causal model over
    ``tokens`` pass ``hidden[:, :-1]``, ``tokens[:, 1:]`` and ``response_mask[:, 1:]``.

    Only response places are projected, ``chunk_tokens`` at a time, and projected again in the backward pass
    (not if the head is frozen); the largest tensor is ``(chunk_tokens, V)``.

    Args:
        hidden: ``(B, T, D)`` last-layer states, after the final norm.
        head_weight: ``(V, D)``, of the type of ``hidden``. Under ZeRO-3 it must stay gathered until backward.
        targets: ``(B, T)`` token ids; read only where ``response_mask`` is True.
        response_mask: ``(B, T)`` bool.
        places: ``(n,)`` int64, where ``response_mask`` is True, row by row; ``None``: found out, for which a GPU has to
            be waited for.
        head_bias: ``(V,)`` or ``None``.
        chunk_tokens: places projected at once; memory against launches. ``None``: see :func:`tokens_at_once`.
        logit_scale: factor on the logits (Cohere; for Granite, one over its ``logits_scaling``).
        softcap: bound on the logits (Gemma 2), or ``None``.
        temperature: the logits are divided by it, last of all: for tokens that were sampled at it.
        with_square_sums: also measure how peaked each distribution is (for WPO weights).
        with_entropies: also give the entropy of each distribution. With a frozen head, twice the memory is kept.
    Returns:
        See :class:`TokenLogprobs`. The projection is added up and kept in float32, as is all after it (float64 if
        ``hidden`` is that): logits that are rounded to bfloat16 would be .02 nats off. Gradients of states and weights
        come in their own type.
    Raises:
        ValueError: if the shapes do not fit, the mask is not bool, or ``chunk_tokens``, ``softcap`` or
            ``temperature`` is not positive.
    """
    check_mask("response_mask", response_mask)
    check_same_shape(hidden=hidden[..., 0], targets=targets, response_mask=response_mask)
    if chunk_tokens is None:
        chunk_tokens = tokens_at_once(len(head_weight))
    check_positive(
        chunk_tokens=chunk_tokens, softcap=1.0 if softcap is None else softcap, temperature=temperature
    )
    shape = _LogitShape(logit_scale, softcap, temperature, chunk_tokens, with_square_sums, with_entropies)
    if places is None:
        places = response_mask.flatten().nonzero().squeeze(1)
    states, chosen = collect(hidden.flatten(0, 1), places), targets.flatten().index_select(0, places)
    logprobs, squares, entropies = _ChunkedLogprobs.apply(states, head_weight, head_bias, chosen, shape)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(targets.numel()).index_copy(0, places, values).view(targets.shape)

    return TokenLogprobs(
        logprobs=placed(logprobs),
        square_sums=placed(squares) if with_square_sums else None,
        entropies=placed(entropies) if with_entropies else None,
    )


def tokens_at_once(vocabulary: int) -> int:
    """How many places are projected at once: fewer for a vocabulary whose float32 logits would take too much memory."""
    return max(1, min(CHUNK_TOKENS, CHUNK_BYTES // (4 * vocabulary)))


def response_logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, response_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's response, summed over its tokens.

    Args:
        hidden, head_weight, targets, response_mask, options: see :func:`token_logprobs`.
    Returns:
        ``sums`` ``(B,)`` in nats and ``counts`` ``(B,)`` int64 of response tokens; both 0 for a row without.
    """
    found = token_logprobs(hidden, head_weight, targets, response_mask, **options)
    return found.logprobs.sum(dim=1), response_mask.sum(dim=1)


def head_logits(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``(n, V)`` logits after states ``(n, D)``: what :func:`token_logprobs` takes the softmax of, before temperature.

    Args:
        hidden, head_weight, head_bias, logit_scale, softcap: see :func:`token_logprobs`.
    Returns:
        In float32 at least; a tensor of its own, free to be overwritten.
    """
    shape = _LogitShape(
        logit_scale, softcap, temperature=1.0, chunk_tokens=1, with_square_sums=False, with_entropies=False
    )
    return _logits(hidden, head_weight, head_bias, shape)


class _LogitShape(NamedTuple):
    scale: float
    softcap: float | None
    temperature: float
    chunk_tokens: int
    with_square_sums: bool
    with_entropies: bool


class _ChunkedLogprobs(torch.autograd.Function):
    """``(n,)`` log-probabilities of targets ``(n,)`` after states ``(n, D)``; and the entropies there.

    Written out, as autograd would keep several ``(chunk, V)`` tensors at once. The backward pass needs only the
    log-sum-exp of each row (and the entropy), from which one more projection gives the softmax. If the head is frozen
    (LoRA), not even that: the gradient to the states is then known up to a factor by row, and made while logits are
    at hand; one such gradient for the log-probability and one for the entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: _LogitShape
    ) -> tuple[Tensor, Tensor, Tensor]:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        normalizers = torch.empty(len(hidden), dtype=precision, device=hidden.device)
        chosen, squares, entropies = (torch.zeros_like(normalizers) for _ in range(3))
        only_hidden = ctx.needs_input_grad[:3] == (True, False, False)
        kept = [torch.empty_like(hidden) for _ in range(1 + shape.with_entropies)] if only_hidden else []
        for part in _chunks(len(hidden), shape.chunk_tokens):
            logits = _logits(hidden[part], weight, bias, shape)
            chosen[part] = logits.gather(1, targets[part, None]).squeeze(1)
            normalizers[part] = logits.logsumexp(dim=-1)
            if shape.with_square_sums:
                squares[part] = (2 * logits).logsumexp(dim=-1) - 2 * normalizers[part]
            if shape.with_entropies:
                entropies[part] = _entropies(logits, normalizers[part])
            if kept:
                slopes = _logit_slopes(logits, targets[part], normalizers[part], entropies[part], shape)
                for to_hidden, slope in zip(kept, slopes, strict=True):
                    to_hidden[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(*(kept if only_hidden else (hidden, weight, bias, targets, normalizers, entropies)))
        ctx.shape, ctx.only_hidden = shape, only_hidden
        ctx.mark_non_differentiable(squares, *(() if shape.with_entropies else (entropies,)))
        return chosen - normalizers, squares, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor, upstream_entropies: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.only_hidden:
            slopes = ctx.saved_tensors
            to_hidden = upstream[:, None] * slopes[0]
            if ctx.shape.with_entropies:
                to_hidden += upstream_entropies[:, None] * slopes[1]
            return to_hidden.to(slopes[0].dtype), None, None, None, None
        hidden, weight, bias, targets, normalizers, entropies = ctx.saved_tensors
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(values, dtype=normalizers.dtype) if needed and values is not None else None
            for values, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for part in _chunks(len(hidden), ctx.shape.chunk_tokens):
            logits = _logits(hidden[part], weight, bias, ctx.shape)
            slopes = _logit_slopes(logits, targets[part], normalizers[part], entropies[part], ctx.shape)
            slope = slopes[0].mul_(upstream[part, None])
            if ctx.shape.with_entropies:
                slope += slopes[1].mul_(upstream_entropies[part, None])
            slope = slope.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[part] = (slope @ weight).to(to_hidden.dtype)
            if to_weight is not None:
                _add_product(to_weight, slope, hidden[part])
            if to_bias is not None:
                to_bias += slope.sum(dim=0)
        gradients = zip((to_hidden, to_weight, to_bias), (hidden, weight, bias), strict=True)
        return (*(g if g is None else g.to(values.dtype) for g, values in gradients), None, None)


def _entropies(logits: Tensor, normalizers: Tensor) -> Tensor:
    """``(n,)`` entropies of the distributions of ``(n, V)`` logits, in nats."""
    logprobs = logits - normalizers[:, None]
    return -logprobs.exp().mul_(logprobs).sum(dim=-1)


def _logit_slopes(
    logits: Tensor, targets: Tensor, normalizers: Tensor, entropies: Tensor, shape: _LogitShape
) -> tuple[Tensor, ...]:
    """``(n, V)`` gradient of each row's log-probability, with respect to the bare product of states and weight.

    With entropies H a second one, theirs. With respect to final logits they are ``[v = target] - p_v`` and
    ``-p_v (log p_v + H)``. Overwrites ``logits``.
    """
    flatness = None if shape.softcap is None else 1 - (logits * (shape.temperature / shape.softcap)) ** 2
    logprobs = logits.sub_(normalizers[:, None])
    of_entropy: tuple[Tensor, ...] = ()
    if shape.with_entropies:
        of_entropy = (logprobs.exp().neg_().mul_(logprobs + entropies[:, None]),)
    slope = logprobs.exp_().neg_()
    slope.scatter_add_(1, targets[:, None], torch.ones_like(targets[:, None], dtype=slope.dtype))
    slopes = (slope, *of_entropy)
    for each in slopes:
        if flatness is not None:
            each *= flatness
        if shape.scale != shape.temperature:
            each *= shape.scale / shape.temperature
    return slopes


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """``total += slope^T hidden``, without a second tensor of that size where the types agree."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, hidden)
    else:
        total += slope.T @ hidden


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: _LogitShape) -> Tensor:
    """``(n, V)`` in float32 at least; a tensor of its own, free to be overwritten."""
    precision = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.dtype == precision:
        logits = F.linear(hidden, weight, bias)
    else:
        logits = _float32_product(hidden, weight)
        if bias is not None:
            logits += bias
    if shape.scale != 1.0:
        logits *= shape.scale
    if shape.softcap is not None:
        logits = logits.div_(shape.softcap).tanh_().mul_(shape.softcap)
    if shape.temperature != 1.0:
        logits /= shape.temperature
    return logits


def _float32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden weight^T`` of low precision, added up and kept in float32."""
    if hidden.is_cuda and torch.version.hip is None:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    wide = hidden.float()
    product = wide.new_empty(len(hidden), len(weight))
    for part in _chunks(len(weight), max(1, BLOCK_BYTES // (4 * weight.shape[1]))):
        torch.mm(wide, weight[part].float().T, out=product[:, part])
    return product


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
