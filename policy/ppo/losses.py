"""Losses of PPO and its kin on the tokens of responses.

Per-token tensors are ``(B, T)``, place t being the response's token t, right-padded, with a ``(B, T)`` bool mask of
response tokens. Functions without a mask work place by place; what they give outside the response is for the caller's
mask, in the end that of :func:`reduce_tokens`.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rlhf.core.checks import check_positive, check_range, check_same_shape
from rlhf.core.masking import check_mask

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut off here before they are exponentiated: exp(20) is 5e8, and exp(89) infinite in float32, which
turns into NaN where it meets an advantage of 0. Beyond it nothing has a gradient."""

IMPORTANCE_LEVELS = ("token", "sequence")
NORMALIZATIONS = ("token", "sequence", "constant")


def _k3(logratios: Tensor) -> Tensor:
    bounded = logratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-bounded) + bounded


_KL: Mapping[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda logratios: logratios,
    "k2": lambda logratios: logratios**2 / 2,
    "k3": _k3,
}
KL_KINDS = tuple(_KL)


def kl_estimates(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    r"""What each token, sampled from the policy, says of the policy's KL divergence from the reference.

        k1 = l,   k2 = l^2 / 2,   k3 = exp(-l) - 1 + l,   l = logprobs - reference

    As numbers: k1 and k3 are unbiased for KL(policy || reference), k2 to second order in l; k2 and k3 are never
    negative. As a loss, on samples of the policy itself: the expected gradient of k1 is zero, that of k2 is the
    gradient of KL(policy || reference), that of k3 the gradient of KL(reference || policy); so k1 belongs into the
    reward alone.

    Args:
        logprobs: ``(B, T)`` of the policy, in nats. Gradients flow.
        reference: ``(B, T)`` of the reference model.
        kind: one of :data:`KL_KINDS`.
    Returns:
        ``(B, T)`` in nats. Of k3, l is cut off at +-:data:`MAX_LOG_RATIO`.
    Raises:
        ValueError: if the shapes differ or ``kind`` is unknown.
    References:
        Schulman, "Approximating KL divergence" (2020); the gradients: Tang and Munos, arXiv:2506.09477.
    """
    check_same_shape(logprobs=logprobs, reference=reference)
    if kind not in _KL:
        raise ValueError(f"kind must be one of {', '.join(KL_KINDS)}, not {kind!r}")
    return _KL[kind](logprobs - reference)


def token_ratios(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    r"""How much likelier each token has become since it was sampled.

        ratio_bt = exp(logprobs_bt - old_logprobs_bt)

    Args:
        logprobs: ``(B, T)`` of the policy, in nats. Gradients flow.
        old_logprobs: ``(B, T)`` of the policy that wrote the responses.
    Returns:
        ``(B, T)``. The log-ratio is cut off at +-:data:`MAX_LOG_RATIO`.
    Raises:
        ValueError: if the shapes differ.
    References:
        Schulman et al., arXiv:1707.06347, sec. 3.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    return _ratios(logprobs - old_logprobs)


def sequence_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    r"""GSPO: one ratio for all tokens of a response, the geometric mean of theirs.

        ratio_bt = exp(mean_u (logprobs_bu - old_logprobs_bu)) where mask_bt, else 0

    The gradient goes through the mean. With an advantage for the whole response and ``normalize="sequence"`` this is
    GSPO's objective; other normalizations weight responses by their length.

    Args:
        logprobs: ``(B, T)`` of the policy, in nats. Gradients flow.
        old_logprobs: ``(B, T)`` of the policy that wrote the responses.
        mask: ``(B, T)`` bool, True on response tokens.
    Returns:
        ``(B, T)``. The mean log-ratio is cut off at +-:data:`MAX_LOG_RATIO`.
    Raises:
        ValueError: if the shapes differ or the mask is not bool.
    References:
        Zheng et al., arXiv:2507.18071, eq. 7.
    """
    check_mask("mask", mask)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    logratios = (logprobs - old_logprobs).masked_fill(~mask, 0)
    means = logratios.sum(dim=1, keepdim=True) / _row_counts(mask)
    return _ratios(means).expand_as(logratios).masked_fill(~mask, 0)


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, level: str, cap: float) -> Tensor:
    r"""How much likelier the trained policy makes what another one has written, cut off at ``cap``.

        token:     w_bt = min(cap, exp(l_bt)),   l = logprobs - sampler_logprobs
        sequence:  w_bt = min(cap, exp(sum_u l_bu))

    An engine that rounds otherwise, or has older weights, draws from another distribution than the trained one.
    Weighted by the ratio of the two, its samples stand for those of the trained one; the bound keeps the variance
    finite, at the price of a bias towards 0.

    Args:
        logprobs: ``(B, T)`` of the policy before its update, in nats.
        sampler_logprobs: ``(B, T)`` of what wrote the responses.
        mask: ``(B, T)`` bool, True on response tokens.
        level: one of :data:`IMPORTANCE_LEVELS`.
        cap: > 0.
    Returns:
        ``(B, T)``; 0 outside of the responses.
    Raises:
        ValueError: if the shapes differ, or level or cap are none.
    References:
        Ionides, "Truncated importance sampling", J. Comput. Graph. Stat. 17 (2008); for rollouts of another engine:
        Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025).
    """
    check_mask("mask", mask)
    check_same_shape(logprobs=logprobs, sampler_logprobs=sampler_logprobs, mask=mask)
    check_positive(cap=cap)
    if level not in IMPORTANCE_LEVELS:
        raise ValueError(f"level must be one of {', '.join(IMPORTANCE_LEVELS)}, not {level!r}")
    logratios = (logprobs - sampler_logprobs).masked_fill(~mask, 0)
    if level == "sequence":
        logratios = logratios.sum(dim=1, keepdim=True).expand_as(logratios)
    return _ratios(logratios).clamp_max(cap).masked_fill(~mask, 0)


def clipped_surrogate(
    ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    r"""PPO's pessimistic surrogate: beyond the bounds, nothing more is won by moving a ratio the way it should go.

        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);   where A < 0, at most dual_clip |A|

    Args:
        ratios: ``(B, T)``, of :func:`token_ratios` or :func:`sequence_ratios`. Gradients flow.
        advantages: ``(B, T)``, taken as constants.
        clip_low: at least 0; from 1 on, there is no lower bound.
        clip_high: at least 0; more than ``clip_low`` is DAPO's "clip-higher".
        dual_clip: greater than 1, or ``None``. A token of negative advantage that has become much likelier is given
            up instead of dominating the batch.
    Returns:
        ``(B, T)`` losses in units of the advantage, unreduced.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Schulman et al., arXiv:1707.06347, eq. 7; unequal bounds: Yu et al., arXiv:2503.14476, eq. 10; dual clip: Ye
        et al., arXiv:1912.09729, eq. 5.
    """
    check_same_shape(ratios=ratios, advantages=advantages)
    check_range(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1, not {dual_clip}: it would cut off what the clip leaves")
    advantages = advantages.detach()
    losses = torch.maximum(-ratios * advantages, -ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
    # Where the advantage is positive the loss is negative, and this bound idle.
    return losses if dual_clip is None else torch.minimum(losses, dual_clip * advantages.abs())


def weighted_likelihood(
    logprobs: Tensor, ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    r"""CISPO: the likelihood of every token, weighted by its advantage and by its clipped ratio, taken as a constant.

        loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprobs

    Where :func:`clipped_surrogate` takes the gradient away from a token that has moved too far, this one bounds its
    weight: rare tokens that matter (wait, however) go on being learned.

    Args:
        logprobs: ``(B, T)`` of the policy, in nats. Gradients flow.
        ratios: ``(B, T)``, of :func:`token_ratios` or :func:`sequence_ratios`, taken as constants.
        advantages: ``(B, T)``, taken as constants.
        clip_low: at least 0; from 1 on, there is no lower bound.
        clip_high: at least 0.
    Returns:
        ``(B, T)`` losses in nats times units of the advantage, unreduced.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.
    """
    check_same_shape(logprobs=logprobs, ratios=ratios, advantages=advantages)
    check_range(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    weights = ratios.detach().clamp(1 - clip_low, 1 + clip_high)
    return -weights * advantages.detach() * logprobs


def clipped_share(
    ratios: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Number of tokens that :func:`clipped_surrogate` (without dual clip) takes the gradient away from.

    Args:
        ratios, advantages, clip_low, clip_high: see :func:`clipped_surrogate`.
        mask: ``(B, T)`` bool, True on response tokens.
    Returns:
        Two int64 scalars, to be added up over micro-batches and ranks before the one is divided by the other: clipped
        tokens and all tokens.
    Raises:
        ValueError: if the shapes differ, the mask is not bool, or a number is out of range.
    """
    check_mask("mask", mask)
    check_same_shape(ratios=ratios, advantages=advantages, mask=mask)
    check_range(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    high = (advantages > 0) & (ratios > 1 + clip_high)
    low = (advantages < 0) & (ratios < 1 - clip_low)
    return ((high | low) & mask).sum(), mask.sum()


def bounded_tokens(ratios: Tensor, mask: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Number of tokens whose weight in :func:`weighted_likelihood` is one of its bounds, whatever their advantage.

    Args:
        ratios, mask, clip_low, clip_high: see :func:`clipped_share`.
    Returns:
        An int64 scalar.
    Raises:
        ValueError: if the shapes differ, the mask is not bool, or a number is out of range.
    """
    check_mask("mask", mask)
    check_same_shape(ratios=ratios, mask=mask)
    check_range(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    return (((ratios > 1 + clip_high) | (ratios < 1 - clip_low)) & mask).sum()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    r"""Squared error of the critic, whose move since the rollout counts only up to a bound.

        loss = max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2

    Args:
        values: ``(B, T)`` of the critic. Gradients flow.
        old_values: ``(B, T)`` of the critic at rollout.
        returns: ``(B, T)`` targets R.
        clip: in units of the value, or ``None`` for the plain squared error.
    Returns:
        ``(B, T)`` losses in squared units of the value, unreduced.
    Raises:
        ValueError: if the shapes differ or ``clip`` is not positive.
    References:
        The code of OpenAI Baselines for arXiv:1707.06347, which does not mention it; Engstrom et al.,
        arXiv:2005.12729, sec. 2.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    errors = (values - returns) ** 2
    if clip is None:
        return errors / 2
    check_positive(clip=clip)
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(errors, (near - returns) ** 2) / 2


def reduce_tokens(
    losses: Tensor, mask: Tensor, *, normalize: str, tokens: int, sequences: int, max_tokens: int
) -> Tensor:
    r"""This micro-batch's share of the loss of a whole minibatch: summed over its micro-batches, it is that loss.

        token     sum_bt losses_bt / tokens
        sequence  sum_b mean_t losses_bt / sequences
        constant  sum_bt losses_bt / (sequences max_tokens)

    Args:
        losses: ``(B, T)``.
        mask: ``(B, T)`` bool, True on the tokens that count.
        normalize: one of :data:`NORMALIZATIONS`.
        tokens: that count, in the whole minibatch over all ranks.
        sequences: of it that have such tokens.
        max_tokens: that a response may have.
    Returns:
        A scalar; 0 without tokens. A row without tokens adds nothing.
    Raises:
        ValueError: if the shapes differ, the mask is not bool, ``normalize`` is unknown, or a count is not positive.
    References:
        token: Yu et al., arXiv:2503.14476, eq. 12; sequence: Shao et al., arXiv:2402.03300, eq. 3; constant: Liu et
        al., arXiv:2503.20783 (Dr. GRPO).
    """
    check_mask("mask", mask)
    check_same_shape(losses=losses, mask=mask)
    check_positive(tokens=tokens, sequences=sequences, max_tokens=max_tokens)
    sums = losses.masked_fill(~mask, 0).sum(dim=1)
    if normalize == "token":
        return sums.sum() / tokens
    if normalize == "sequence":
        return (sums / _row_counts(mask).squeeze(1)).sum() / sequences
    if normalize == "constant":
        return sums.sum() / (sequences * max_tokens)
    raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, not {normalize!r}")


def _ratios(logratios: Tensor) -> Tensor:
    return logratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _row_counts(mask: Tensor) -> Tensor:
    """``(B, 1)`` tokens of each row; 1 for a row without, whose sum is 0 whatever it is divided by."""
    return mask.sum(dim=1, keepdim=True).clamp_min(1)
