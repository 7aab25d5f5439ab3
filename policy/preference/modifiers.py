"""Changes to what an objective reads or how pairs count, each before or after the loss itself."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.core.checks import check_same_shape

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

MAX_EXPONENT = 40.0
"""Largest exponent of a ratio. Beyond 44 the square that "ipo" takes is infinite in float32; beyond 88 the score itself
is, and the difference of two such scores is NaN."""


def divergence_scores(logratios: Tensor, kind: Divergence, alpha: float = 0.5) -> Tensor:
    r"""f-DPO: what takes the place of log-ratios when the policy is held by another divergence than reverse KL.

        score = f'(u),  u = pi / pi_ref = exp(logratio)
        reverse_kl  log u              forward_kl  1 - 1 / u
        js          log(2 u / (1 + u))      alpha  (u^(alpha - 1) - 1) / (alpha - 1)

    Args:
        logratios: ``(B,)`` in nats, float32 or wider.
        kind: of divergence.
        alpha: for "alpha" alone: 1 is reverse KL and 0 forward KL, as in TRL's code; the paper's alpha is 1 - alpha.
    Returns:
        ``(B,)`` scores, increasing in the log-ratio. Where an exponent reaches :data:`MAX_EXPONENT`, constant.
    Raises:
        ValueError: if ``kind`` is none of these.
    References:
        Wang et al., arXiv:2309.16240, table 1. TRL bounds the exponent for "alpha" only, at 80.
    """
    if kind == "reverse_kl":
        return logratios
    if kind == "forward_kl":
        return _power_score(logratios, 0.0)
    if kind == "js":
        return math.log(2) + F.logsigmoid(logratios)
    if kind == "alpha":
        return logratios if alpha == 1 else _power_score(logratios, alpha)
    raise ValueError(f"kind must be one of 'reverse_kl', 'forward_kl', 'js', 'alpha', not {kind!r}")


def wpo_weights(
    chosen_logprobs: Tensor,
    chosen_square_sums: Tensor,
    chosen_lengths: Tensor,
    rejected_logprobs: Tensor,
    rejected_square_sums: Tensor,
    rejected_lengths: Tensor,
    *,
    largest: float | None = None,
) -> Tensor:
    r"""WPO: how likely the policy would have been to write the pair itself; factors of the pairs' losses.

        weight_i = min(largest, w(chosen_i) w(rejected_i)),   w(y) = exp(mean_t (log p(y_t) - log sum_v p(v)^2))

    Args:
        chosen_logprobs, rejected_logprobs: ``(B,)`` in nats, summed over response tokens.
        chosen_square_sums, rejected_square_sums: ``(B,)``, log sum_v p(v)^2 under the policy at each response token,
            summed over them.
        chosen_lengths, rejected_lengths: ``(B,)`` response tokens, at least 1.
        largest: bound on the weights; ``None`` for none.
    Returns:
        ``(B,)`` weights, no gradient: 1 where every token has the probability that a sampled one has on average.
    Raises:
        ValueError: if the shapes differ.
    References:
        Zhou et al., arXiv:2406.11827, eq. 2. The authors' code has ``largest=1``; TRL 1.16 has no bound any more.
    """
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        chosen_square_sums=chosen_square_sums,
        chosen_lengths=chosen_lengths,
        rejected_logprobs=rejected_logprobs,
        rejected_square_sums=rejected_square_sums,
        rejected_lengths=rejected_lengths,
    )
    chosen = (chosen_logprobs - chosen_square_sums) / chosen_lengths
    rejected = (rejected_logprobs - rejected_square_sums) / rejected_lengths
    weights = torch.exp(chosen + rejected).detach()
    return weights if largest is None else weights.clamp(max=largest)


def length_desensitized(head: Tensor, tail: Tensor, alpha: float) -> Tensor:
    r"""LD-DPO: summed log-probabilities in which tokens past the length of the pair's shorter response count less.

        log-probability = head + alpha tail

    Args:
        head: ``(B,)`` in nats, summed over the first min(n_w, n_l) response tokens.
        tail: ``(B,)``, summed over the tokens after those; 0 for the shorter response.
        alpha: in [0, 1]; 1 is the plain sum. Use it on the policy's and the reference's sums alike.
    Returns:
        ``(B,)`` in nats.
    Raises:
        ValueError: if the shapes differ or ``alpha`` is out of range.
    References:
        Liu et al., arXiv:2409.06411.
    """
    check_same_shape(head=head, tail=tail)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], not {alpha}")
    return head + alpha * tail


def _power_score(logratios: Tensor, alpha: float) -> Tensor:
    exponent = ((alpha - 1) * logratios).clamp(max=MAX_EXPONENT)
    return torch.expm1(exponent) / (alpha - 1)
