"""Objectives that look at the lengths of the responses, among them those without a reference; see
:mod:`policy.preference.pair_losses` for what the inputs are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.preference.pair_losses import logistic_link, reward_gap
from rlhf.core.checks import check_positive, check_range, check_same_shape


def ipo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> Tensor:
    r"""IPO on log-ratios per token: regression of the gap on a fixed target, which it does not run past.

        loss_i = (d_w / n_w - d_l / n_l - m_i / beta - 1 / (2 beta))^2

    Args:
        chosen_logratios, rejected_logratios: see :func:`sigmoid_loss`.
        chosen_lengths, rejected_lengths: ``(B,)`` response tokens, at least 1.
        margins: see :func:`sigmoid_loss`.
        beta: strength of the regularization, tau in the paper.
    Returns:
        ``(B,)`` losses in nats per token, squared.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Azar et al., arXiv:2310.12036, eq. 17, which does not name the averaging; TRL has it from the authors.
    """
    check_positive(beta=beta)
    gap = average_gap(
        chosen_lengths, rejected_lengths, chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios
    )
    return ((_less(beta * gap, margins) - 0.5) / beta) ** 2


def sigmoid_norm_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 5.0,
) -> Tensor:
    r"""Length-normalized DPO.

        loss_i = -log s(beta (d_w / n_w - d_l / n_l) - m_i)

    Args:
        chosen_logratios, rejected_logratios, chosen_lengths, rejected_lengths, margins: see :func:`ipo_loss`.
        beta: implicit reward per nat per token.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Tulu 3, arXiv:2411.15124, with its ``beta``.
    """
    check_positive(beta=beta)
    gap = average_gap(
        chosen_lengths, rejected_lengths, chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios
    )
    return -F.logsigmoid(_less(beta * gap, margins))


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    r"""SimPO: log-probability per token as the reward, no reference model, and a target margin.

        loss_i = -log s(beta (logp_w / n_w - logp_l / n_l) - gamma - m_i)

    Args:
        chosen_logprobs, rejected_logprobs: ``(B,)`` in nats, summed over response tokens.
        chosen_lengths, rejected_lengths, margins: see :func:`ipo_loss`.
        beta: reward per nat per token.
        gamma: target margin in units of reward; the ratio gamma / beta that papers quote is .5 here.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Meng et al., arXiv:2405.14734, eq. 6.
    """
    check_positive(beta=beta)
    gap = average_gap(
        chosen_lengths, rejected_lengths, chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    return -F.logsigmoid(_less(beta * gap - gamma, margins))


def sft_loss(chosen_logprobs: Tensor, chosen_lengths: Tensor) -> Tensor:
    r"""Negative log-likelihood per token of the chosen response: a term of sums such as RPO's and MPO's.

        loss_i = -logp_w / n_w

    Args:
        chosen_logprobs: ``(B,)`` in nats, summed over response tokens.
        chosen_lengths: ``(B,)`` response tokens, at least 1.
    Returns:
        ``(B,)`` losses in nats per token.
    Raises:
        ValueError: if the shapes differ.
    References:
        RPO, arXiv:2404.19733, eq. 1; MPO, arXiv:2411.10442. TRL averages over the tokens of the batch, so that
        long responses count for more; here each response counts once.
    """
    check_same_shape(chosen_logprobs=chosen_logprobs, chosen_lengths=chosen_lengths)
    return -chosen_logprobs / chosen_lengths


def cpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    r"""CPO: DPO with a uniform reference, plus the likelihood of the chosen response.

        loss_i = link(beta (logp_w - logp_l) - m_i) - nll_weight logp_w / n_w,   link as in :func:`aot_loss`

    Args:
        chosen_logprobs, rejected_logprobs: ``(B,)`` in nats, summed over response tokens.
        chosen_lengths: ``(B,)`` response tokens, at least 1.
        margins, beta, smoothing: see :func:`sigmoid_loss`.
        nll_weight: of the second term, at least 0.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Xu et al., arXiv:2401.08417. The second term is :func:`sft_loss`, with the averaging told there.
    """
    check_positive(beta=beta)
    check_range(0, math.inf, nll_weight=nll_weight)
    check_same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    preference = logistic_link(_less(beta * (chosen_logprobs - rejected_logprobs), margins), smoothing)
    return preference + nll_weight * sft_loss(chosen_logprobs, chosen_lengths)


def orpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    weight: float = 0.1,
) -> Tensor:
    r"""ORPO: likelihood of the chosen response plus the log odds ratio of the two, no reference model.

        loss_i = -a_w - weight log s(log odds(a_w) - log odds(a_l)),   a = logp / n,  log odds(a) = a - log(1 - e^a)

    Args:
        chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths: see :func:`simpo_loss`.
        weight: of the odds-ratio term, at least 0; lambda in the paper, "beta" in TRL.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``weight`` is negative.
    References:
        Hong et al., arXiv:2403.07691, eqs. 4 and 7. The first term is :func:`sft_loss`, with the averaging told there.
    """
    check_range(0, math.inf, weight=weight)
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    ratio = _log_odds(chosen_logprobs / chosen_lengths) - _log_odds(rejected_logprobs / rejected_lengths)
    return sft_loss(chosen_logprobs, chosen_lengths) - weight * F.logsigmoid(ratio)


def r_dpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.005,
) -> Tensor:
    r"""R-DPO: DPO for a reward that charges ``alpha`` per token of response.

        loss_i = -log s(beta d_i + alpha (n_w - n_l) - m_i)

    The optimum for reward r - alpha n has r = beta log(pi / pi_ref) + alpha n + const, which gives the sign: a chosen
    response that is longer needs less of a lead, so that length is not learned from it.

    Args:
        chosen_logratios, rejected_logratios, chosen_lengths, rejected_lengths, margins: see :func:`ipo_loss`.
        beta: see :func:`sigmoid_loss`.
        alpha: reward charged per token, at least 0.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Park et al., arXiv:2403.19159, where alpha is .005 or .01 for dialogue and .2 or .5 for summaries.
    """
    check_range(0, math.inf, alpha=alpha)
    gap = reward_gap(beta, chosen_logratios, rejected_logratios, margins)
    check_same_shape(
        chosen_logratios=chosen_logratios, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    return -F.logsigmoid(gap + alpha * (chosen_lengths - rejected_lengths))


def average_gap(chosen_lengths: Tensor, rejected_lengths: Tensor, **pair: Tensor) -> Tensor:
    """Difference per token of ``pair``, two tensors whose names a refusal repeats, the chosen one first."""
    check_same_shape(**pair, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    chosen, rejected = pair.values()
    return chosen / chosen_lengths - rejected / rejected_lengths


def _log_odds(average: Tensor) -> Tensor:
    # A response of probability 1 has infinite odds, and their gradient is NaN: stop at the last number below 1.
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    return average - torch.log(-torch.expm1(average))


def _less(gap: Tensor, margins: Tensor | None) -> Tensor:
    check_same_shape(gap=gap, margins=margins)
    return gap if margins is None else gap - margins
