"""Log-probabilities of responses under a language-model head, without a (rows, tokens, vocabulary) tensor."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.core.checks import check_positive, check_same_shape
from rlhf.core.masking import check_mask

CHUNK_TOKENS = 256


class TokenLogprobs(NamedTuple):
    """What :func:`token_logprobs` says of B rows of T places; 0 at places outside the response."""

    logprobs: Tensor
    """``(B, T)`` in nats."""
    square_sums: Tensor | None
    """``(B, T)`` log of the sum over the vocabulary of squared probabilities, without gradient; if asked for."""


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    response_mask: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_square_sums: bool = False,
) -> TokenLogprobs:
    r"""Log-probability of each response token.

        logits_bt   = logit_scale (head_weight hidden_bt + head_bias);  softcap tanh(logits / softcap) if given
        logprobs_bt = log softmax(logits_bt)[targets_bt]   where response_mask_bt, else 0

    ``hidden[b, t]`` is what predicts ``targets[b, t]``: nothing is shifted here. With a causal model over
    ``tokens`` pass ``hidden[:, :-1]``, ``tokens[:, 1:]`` and ``response_mask[:, 1:]``.

    Only response places are projected, ``chunk_tokens`` at a time, and projected again in the backward pass
    (not if the head is frozen); the largest tensor is ``(chunk_tokens, V)``.

    Args:
        hidden: ``(B, T, D)`` last-layer states, after the final norm.
        head_weight: ``(V, D)``, of the type of ``hidden``. Under ZeRO-3 it must stay gathered until backward.
        targets: ``(B, T)`` token ids; read only where ``response_mask`` is True.
        response_mask: ``(B, T)`` bool.
        head_bias: ``(V,)`` or ``None``.
        chunk_tokens: places projected at once; memory against launches.
        logit_scale: factor on the logits (Cohere; for Granite, one over its ``logits_scaling``).
        softcap: bound on the logits (Gemma 2), or ``None``.
        with_square_sums: also measure how peaked each distribution is (for WPO weights).
    Returns:
        See :class:`TokenLogprobs`. The projection runs in the type of ``hidden``, all after it in float32
        (float64 if it is that).
    Raises:
        ValueError: if the shapes do not fit, the mask is not bool, or ``chunk_tokens`` or ``softcap`` is not
            positive.
    """
    check_mask("response_mask", response_mask)
    check_same_shape(hidden=hidden[..., 0], targets=targets, response_mask=response_mask)
    check_positive(chunk_tokens=chunk_tokens, softcap=1.0 if softcap is None else softcap)
    shape = _LogitShape(logit_scale, softcap, chunk_tokens, with_square_sums)
    logprobs, squares = _ChunkedLogprobs.apply(
        hidden[response_mask], head_weight, head_bias, targets[response_mask], shape
    )

    def placed(values: Tensor) -> Tensor:
        return torch.zeros(targets.shape, dtype=values.dtype, device=values.device).masked_scatter(
            response_mask, values
        )

    return TokenLogprobs(placed(logprobs), placed(squares) if with_square_sums else None)


def response_logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, response_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's response, summed over its tokens.

    Args:
        hidden, head_weight, targets, response_mask, options: see :func:`token_logprobs`.
    Returns:
        ``sums`` ``(B,)`` in nats and ``counts`` ``(B,)`` int64 of response tokens; both 0 for a row without.
    """
    logprobs, _ = token_logprobs(hidden, head_weight, targets, response_mask, **options)
    return logprobs.sum(dim=1), response_mask.sum(dim=1)


class _LogitShape(NamedTuple):
    scale: float
    softcap: float | None
    chunk_tokens: int
    with_square_sums: bool


class _ChunkedLogprobs(torch.autograd.Function):
    """``(n,)`` log-probabilities of targets ``(n,)`` after states ``(n, D)``.

    Written out, as autograd would keep several ``(chunk, V)`` tensors at once. The backward pass needs only the
    log-sum-exp of each row, from which one more projection gives the softmax. If the head is frozen (LoRA), not
    even that: the gradient to the states is then known up to a factor by row, and made while logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: _LogitShape
    ) -> tuple[Tensor, Tensor]:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        normalisers = torch.empty(len(hidden), dtype=precision, device=hidden.device)
        chosen, squares = torch.empty_like(normalisers), torch.zeros_like(normalisers)
        only_hidden = ctx.needs_input_grad[:3] == (True, False, False)
        slopes = torch.empty_like(hidden) if only_hidden else None
        for part in _chunks(len(hidden), shape.chunk_tokens):
            logits = _logits(hidden[part], weight, bias, shape)
            chosen[part] = logits.gather(1, targets[part, None]).squeeze(1)
            normalisers[part] = logits.logsumexp(dim=-1)
            if shape.with_square_sums:
                squares[part] = (2 * logits).logsumexp(dim=-1) - 2 * normalisers[part]
            if slopes is not None:
                slopes[part] = _logit_slope(logits, targets[part], normalisers[part], shape).to(weight.dtype) @ weight
        ctx.save_for_backward(*((slopes,) if only_hidden else (hidden, weight, bias, targets, normalisers)))
        ctx.shape = shape
        ctx.mark_non_differentiable(squares)
        return chosen - normalisers, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (slopes,) = ctx.saved_tensors
            return (upstream[:, None] * slopes).to(slopes.dtype), None, None, None, None
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(values, dtype=normalisers.dtype) if needed and values is not None else None
            for values, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for part in _chunks(len(hidden), ctx.shape.chunk_tokens):
            logits = _logits(hidden[part], weight, bias, ctx.shape)
            slope = _logit_slope(logits, targets[part], normalisers[part], ctx.shape)
            slope = slope.mul_(upstream[part, None]).to(weight.dtype)
            if to_hidden is not None:
                to_hidden[part] = (slope @ weight).to(to_hidden.dtype)
            if to_weight is not None:
                _add_product(to_weight, slope, hidden[part])
            if to_bias is not None:
                to_bias += slope.sum(dim=0)
        gradients = zip((to_hidden, to_weight, to_bias), (hidden, weight, bias), strict=True)
        return (*(g if g is None else g.to(values.dtype) for g, values in gradients), None, None)


def _logit_slope(logits: Tensor, targets: Tensor, normalisers: Tensor, shape: _LogitShape) -> Tensor:
    """``(n, V)`` gradient of each row's log-probability with respect to the bare product of states and weight.

    Overwrites ``logits``.
    """
    flatness = None if shape.softcap is None else 1 - (logits / shape.softcap) ** 2
    slope = logits.sub_(normalisers[:, None]).exp_().neg_()
    slope.scatter_add_(1, targets[:, None], torch.ones_like(targets[:, None], dtype=slope.dtype))
    if flatness is not None:
        slope *= flatness
    if shape.scale != 1.0:
        slope *= shape.scale
    return slope


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """``total += slope^T hidden``, without a second tensor of that size where the types agree."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, hidden)
    else:
        total += slope.T @ hidden


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: _LogitShape) -> Tensor:
    """``(n, V)`` in float32 at least; a tensor of its own, free to be overwritten."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shape.scale != 1.0:
        logits *= shape.scale
    if shape.softcap is not None:
        logits = logits.div_(shape.softcap).tanh_().mul_(shape.softcap)
    return logits


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
