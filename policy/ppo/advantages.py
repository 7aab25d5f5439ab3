"""How much better each token of a response was than expected: rewards by token, baselines, whitening.

Per-token tensors are ``(B, T)``, place t being the response's token t, right-padded, with a ``(B, T)`` bool mask of
response tokens; what stands outside it has no influence, and results are 0 there. B is all responses of a step, over
all ranks: means, deviations and groups are theirs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.core.checks import check_positive, check_range, check_same_shape
from rlhf.core.masking import check_mask, last_token_index

MIN_VARIANCE = 1e-8
"""Added to the variance that advantages are whitened by."""

MIN_DEVIATION = 1e-6
"""Added to the deviation that scores of a group are divided by."""


class Advantages(NamedTuple):
    """What an estimator says of B responses; 0 outside them."""

    advantages: Tensor
    """``(B, T)``, not whitened."""
    returns: Tensor | None
    """``(B, T)`` targets of the critic, if the estimator has one."""


# Rewards.


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """``(B,)`` scores kept within +-``limit``; as they are without one.

    Raises:
        ValueError: if ``limit`` is not positive.
    """
    if limit is None:
        return scores
    check_positive(limit=limit)
    return scores.clamp(-limit, limit)


def missing_end_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Scores less ``penalty`` where the response ran into the length limit.

    Args:
        scores: ``(B,)``.
        ended: ``(B,)`` bool, True where the response ends with an end token.
        penalty: at least 0, in units of the score.
    Returns:
        ``(B,)`` scores.
    Raises:
        ValueError: if the shapes differ, ``ended`` is not bool, or ``penalty`` is negative.
    """
    check_same_shape(scores=scores, ended=ended)
    check_range(0, float("inf"), penalty=penalty)
    if ended.dtype != torch.bool:
        raise ValueError(f"'ended' must be bool, not {ended.dtype}")
    return torch.where(ended, scores, scores - penalty)


def length_penalty(lengths: Tensor, *, free_tokens: int, max_tokens: int, penalty: float) -> Tensor:
    r"""Soft punishment of long responses, to be added to their scores.

        -penalty clip((length - free_tokens) / (max_tokens - free_tokens), 0, 1)

    Args:
        lengths: ``(B,)`` response tokens.
        free_tokens: that cost nothing.
        max_tokens: at which the penalty is whole.
        penalty: at least 0, in units of the score.
    Returns:
        ``(B,)`` float32, from ``-penalty`` to 0.
    Raises:
        ValueError: if a number is negative or ``free_tokens`` is not below ``max_tokens``.
    References:
        Yu et al., arXiv:2503.14476, eq. 13, with L_max = max_tokens, L_cache = max_tokens - free_tokens, penalty 1.
    """
    check_range(0, max_tokens, free_tokens=free_tokens)
    check_range(0, float("inf"), penalty=penalty)
    excess = (lengths - free_tokens).float() / (max_tokens - free_tokens)
    return -penalty * excess.clamp(0, 1)


def token_rewards(scores: Tensor, kl: Tensor | None, mask: Tensor, coefficient: float) -> Tensor:
    r"""The reward of each token: its share of the KL penalty, and at the last one the score of the response.

        reward_bt = -coefficient kl_bt + [t is the last token of b] scores_b

    Args:
        scores: ``(B,)``.
        kl: ``(B, T)`` in nats, or ``None`` for no penalty.
        mask: ``(B, T)`` bool, True on response tokens.
        coefficient: reward per nat.
    Returns:
        ``(B, T)``, of the type of ``scores``.
    Raises:
        ValueError: if the shapes differ, the mask is not bool, or a row has no token: its score would be lost.
    References:
        Ziegler et al., arXiv:1909.08593, eq. 2, token by token.
    """
    last = last_token_index(mask)
    check_same_shape(scores=scores, mask_rows=last)
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    if kl is not None:
        check_same_shape(kl=kl, mask=mask)
        rewards -= (coefficient * kl).masked_fill(~mask, 0)
    return rewards.scatter_add(1, last[:, None], scores[:, None])


# Advantages of tokens.


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation.

        A_t = sum_l (gamma lam)^l delta_(t + l),   delta_t = r_t + gamma V_(t + 1) - V_t

    The value after the last token is 0: the episode ends there. So it does for a response that was cut off at the
    length limit, as its score is final too.

    Args:
        rewards: ``(B, T)`` of :func:`token_rewards`.
        values: ``(B, T)``, V_t being the expected return before token t is written.
        mask: ``(B, T)`` bool, True on response tokens, right-padded.
        gamma: discount per token, in [0, 1].
        lam: in [0, 1]; 0 trusts the values, 1 the rewards.
    Returns:
        ``(B, T)`` advantages, and ``(B, T)`` returns: advantages plus values.
    Raises:
        ValueError: if the shapes differ, the mask is not right-padded bool, or a number is out of range.
    References:
        Schulman et al., arXiv:1506.02438, eq. 16.
    """
    _check_right_padded(mask)
    check_same_shape(rewards=rewards, values=values, mask=mask)
    _check_share(gamma=gamma, lam=lam)
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    advantages = _discounted_sums(rewards + gamma * following - values, gamma * lam)
    return advantages, advantages + values


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    r"""Discounted sum of this and all later rewards of a response.

        G_t = sum_l gamma^l r_(t + l)

    Args:
        rewards: ``(B, T)`` of :func:`token_rewards`.
        mask: ``(B, T)`` bool, True on response tokens, right-padded.
        gamma: discount per token, in [0, 1].
    Returns:
        ``(B, T)``.
    Raises:
        ValueError: if the shapes differ, the mask is not right-padded bool, or ``gamma`` is out of range.
    """
    _check_right_padded(mask)
    check_same_shape(rewards=rewards, mask=mask)
    _check_share(gamma=gamma)
    return _discounted_sums(rewards.masked_fill(~mask, 0), gamma)


def spread(scores: Tensor, mask: Tensor) -> Tensor:
    """``(B, T)``: the ``(B,)`` number of each row at all its tokens.

    Raises:
        ValueError: if the row counts differ or the mask is not bool.
    """
    check_mask("mask", mask)
    check_same_shape(scores=scores, mask_rows=mask.any(dim=1))
    return scores[:, None].expand(mask.shape).masked_fill(~mask, 0)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    r"""Bring all tokens together to mean 0 and variance 1.

        (v - mean) / sqrt(var + 1e-8)

    Args:
        values: ``(B, T)``.
        mask: ``(B, T)`` bool, True on the tokens that count.
    Returns:
        ``(B, T)``; equal values (or a single one) are at the mean. Mean and variance (over n - 1) are taken in
        float64: in float32, rounding of the mean would be blown up to values of its own where all are equal.
    Raises:
        ValueError: if the shapes differ or the mask is not bool.
    References:
        As ``masked_whiten`` of TRL's PPO.
    """
    check_mask("mask", mask)
    check_same_shape(values=values, mask=mask)
    chosen = values[mask].double()
    if chosen.numel() == 0:
        return torch.zeros_like(values)
    mean = chosen.mean()
    variance = ((chosen - mean) ** 2).sum() / max(chosen.numel() - 1, 1)
    whitened = (chosen - mean) / (variance + MIN_VARIANCE).sqrt()
    return torch.zeros_like(values).masked_scatter(mask, whitened.to(values.dtype))


# Advantages of responses, against the others to the same prompt.


def group_means(scores: Tensor, groups: Tensor) -> Tensor:
    """``(B,)`` mean score of the responses to each row's prompt, its own among them.

    Args:
        scores: ``(B,)``.
        groups: ``(B,)`` int64, equal for responses to one prompt; in any order.
    Raises:
        ValueError: if the shapes differ or a group is of one.
    """
    by_group = _Groups(scores, groups)
    return by_group.mean(scores.double()).to(scores.dtype)


def rloo(scores: Tensor, groups: Tensor) -> Tensor:
    r"""REINFORCE leave-one-out: each score less the mean of the other responses to its prompt.

        A_i = s_i - sum_(j != i) s_j / (n - 1)

    Args:
        scores: ``(B,)``.
        groups: ``(B,)`` int64, equal for the n responses to one prompt; in any order.
    Returns:
        ``(B,)`` advantages.
    Raises:
        ValueError: if the shapes differ or a group is of one.
    References:
        Ahmadian et al., arXiv:2402.14740, after Kool et al. (2019).
    """
    by_group = _Groups(scores, groups)
    whole = scores.double()
    others = (by_group.sum(whole) - whole) / (by_group.sizes - 1)
    return (whole - others).to(scores.dtype)


def grpo(scores: Tensor, groups: Tensor, *, scale: bool) -> Tensor:
    r"""Scores standardized among the responses to one prompt.

        A_i = (s_i - mean) / (sd + 1e-6);   without ``scale``: s_i - mean

    Args:
        scores: ``(B,)``.
        groups: ``(B,)`` int64, equal for responses to one prompt; in any order.
        scale: whether to divide by the deviation, which lifts prompts whose scores hardly differ.
    Returns:
        ``(B,)`` advantages; 0 in a group of equal scores.
    Raises:
        ValueError: if the shapes differ or a group is of one.
    References:
        Shao et al., arXiv:2402.03300, sec. 4.1.2, which says neither over what the deviation is taken (here n - 1, as
        in TRL) nor how 0 is avoided; without ``scale``: Dr. GRPO, Liu et al., arXiv:2503.20783.
    """
    by_group = _Groups(scores, groups)
    whole = scores.double()
    centered = whole - by_group.mean(whole)
    if scale:
        centered = centered / ((by_group.sum(centered**2) / (by_group.sizes - 1)).sqrt() + MIN_DEVIATION)
    return centered.to(scores.dtype)


class _Groups:
    """Sums by group, in float64: of equal scores, float32 would leave rounding errors for GRPO to blow up."""

    def __init__(self, scores: Tensor, groups: Tensor) -> None:
        check_same_shape(scores=scores, groups=groups)
        ids, self._places, sizes = groups.unique(return_inverse=True, return_counts=True)
        single = ids[sizes < 2].tolist()
        if single:
            reason = "there is nothing to compare it with; rollout.samples must be at least 2"
            raise ValueError(f"groups with one response (first of {len(single)}: {single[0]}): {reason}")
        self.sizes = sizes[self._places]
        self._count = len(ids)

    def sum(self, values: Tensor) -> Tensor:
        """``(B,)``: the sum over each row's group."""
        totals = values.new_zeros(self._count).index_add(0, self._places, values)
        return totals[self._places]

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes


# The estimators by name.


@torch.no_grad()
def gae_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> Advantages:
    """See :func:`gae`."""
    return Advantages(*gae(rewards, values, mask, gamma=gamma, lam=lam))


@torch.no_grad()
def reward_to_go_advantages(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Advantages:
    """See :func:`rewards_to_go`."""
    return Advantages(rewards_to_go(rewards, mask, gamma), None)


@torch.no_grad()
def rloo_advantages(rewards: Tensor, mask: Tensor, groups: Tensor) -> Advantages:
    """:func:`rloo` of whole responses, by the sum of their token rewards."""
    return Advantages(spread(rloo(_sums(rewards, mask), groups), mask), None)


@torch.no_grad()
def grpo_advantages(rewards: Tensor, mask: Tensor, groups: Tensor) -> Advantages:
    """:func:`grpo` of whole responses, by the sum of their token rewards."""
    return Advantages(spread(grpo(_sums(rewards, mask), groups, scale=True), mask), None)


@torch.no_grad()
def centered_advantages(rewards: Tensor, mask: Tensor, groups: Tensor) -> Advantages:
    """:func:`grpo_advantages` without the division by the deviation (Dr. GRPO)."""
    return Advantages(spread(grpo(_sums(rewards, mask), groups, scale=False), mask), None)


@torch.no_grad()
def baseline_advantages(rewards: Tensor, mask: Tensor, groups: Tensor) -> Advantages:
    """Sums of token rewards of whole responses, less the mean of their group."""
    sums = _sums(rewards, mask)
    return Advantages(spread(sums - group_means(sums, groups), mask), None)


def _sums(rewards: Tensor, mask: Tensor) -> Tensor:
    """``(B,)`` sums of token rewards."""
    check_mask("mask", mask)
    check_same_shape(rewards=rewards, mask=mask)
    return rewards.masked_fill(~mask, 0).sum(dim=1)


def _discounted_sums(values: Tensor, factor: float) -> Tensor:
    """``(B, T)``: each column plus ``factor`` times the result of the next one."""
    sums, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for place in reversed(range(values.shape[1])):
        following = values[:, place] + factor * following
        sums[:, place] = following
    return sums


def _check_right_padded(mask: Tensor) -> None:
    check_mask("mask", mask)
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("'mask' must be right-padded: a row has tokens after its first padding")


def _check_share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {value}")
