"""Objectives of single pairs: functions of the two log-ratios alone. Unreduced; :data:`policy.preference.losses.LOSSES`
names them.

Inputs, ``(B,)`` each: ``chosen_logprobs`` and ``rejected_logprobs``, in nats, summed over response tokens;
``chosen_logratios`` (d_w) and ``rejected_logratios`` (d_l), the same less the reference model's, d = d_w - d_l;
``chosen_lengths`` (n_w) and ``rejected_lengths`` (n_l), response tokens, at least 1; s is the sigmoid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.core.checks import check_positive, check_range, check_same_shape


def sigmoid_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Tensor:
    r"""DPO: logistic regression on the gap between two implicit rewards; with ``smoothing``, cDPO.

        loss_i = -(1 - smoothing) log s(beta d_i - m_i) - smoothing log s(m_i - beta d_i),   d = d_w - d_l

    Args:
        chosen_logratios: ``(B,)`` in nats, log pi(y_w) / pi_ref(y_w), summed over response tokens.
        rejected_logratios: the same of y_l.
        margins: ``(B,)`` m in units of reward, by which the chosen response is to lead; ``None`` for 0.
        beta: implicit reward per nat.
        smoothing: share of labels expected to be swapped, in [0, 0.5).
    Returns:
        ``(B,)`` losses in nats, unreduced: averaging over pairs and ranks is the caller's choice.
    Raises:
        ValueError: if the shapes differ, ``(B,)`` and ``(B, 1)`` among them, or a number is out of range.
    References:
        Rafailov et al., arXiv:2305.18290, eq. 7; smoothing: Mitchell, "A note on DPO with noisy preferences" (2023);
        margins: DPO with an offset, Amini et al., arXiv:2402.10571.
    """
    return logistic_link(reward_gap(beta, chosen_logratios, rejected_logratios, margins), smoothing)


def margin_sigmoid_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float = 0.1,
    delta: float = 0.1,
    smoothing: float = 0.0,
    gate: bool | None = None,
) -> Tensor:
    r"""Adaptive Margin-Sigmoid: both terms of cDPO, each cut off once it is below ``delta``.

        loss_i = (1 - smoothing) max(0, l+ - delta) + smoothing max(0, l- - delta),   l+- = -log s(+-beta d_i)

    A pair rests (its loss has no gradient) once l+ is below ``delta``, as the report claims, if ``smoothing`` is 0.
    With more than that no pair ever rests: l- is above log 2 where l+ is below it, so that the second term alone is
    left, and pushes the pair back, the wrong way. ``gate`` takes that term away from pairs whose l+ is below delta.

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        delta: in nats, in [0, log 2); 0 is cDPO. A schedule passes each step's value.
        smoothing: see :func:`sigmoid_loss`.
        gate: whether pairs below ``delta`` rest also with smoothing; false or ``None`` for the formula as printed.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Yao, Yuan and Chen, arXiv:2508.08466, which states neither ``delta`` nor ``smoothing``: these defaults are ours,
        as is ``gate``.
    """
    if not 0 <= delta < math.log(2):
        reason = "training starts at d = 0, where both terms are log 2: a larger delta would leave no gradient"
        raise ValueError(f"delta must be in [0, log 2), not {delta}: {reason}")
    check_smoothing(smoothing)
    gap = reward_gap(beta, chosen_logratios, rejected_logratios)
    kept, swapped = F.relu(-F.logsigmoid(gap) - delta), F.relu(-F.logsigmoid(-gap) - delta)
    if gate:
        swapped = swapped * (kept > 0)
    return (1 - smoothing) * kept + smoothing * swapped


def apo_hinge_zero_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.1,
    margin: float = 1.0,
) -> Tensor:
    r"""Hinges that push the chosen response above the reference and the rejected one below it.

        loss_i = max(0, margin + m_i / 2 - beta d_w) + max(0, margin + m_i / 2 + beta d_l)

    A response whose log-ratio has reached margin / beta on its side has no gradient.

    Args:
        chosen_logratios, rejected_logratios, margins, beta: see :func:`sigmoid_loss`; half of m is asked of each side.
        margin: implicit reward asked for on each side, at least 0.
    Returns:
        ``(B,)`` losses in units of reward.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        "APO-hinge-zero" of Yao, Yuan and Chen, arXiv:2508.08466; m is ours.
    """
    check_range(0, math.inf, margin=margin)
    chosen, rejected = implicit_pair(beta, chosen_logratios, rejected_logratios)
    each = margin + _half(margins, chosen)
    return F.relu(each - chosen) + F.relu(each + rejected)


def apo_softplus_zero_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.3,
    margin: float = 1.0,
) -> Tensor:
    r""":func:`apo_hinge_zero_loss` with softplus for the hinges, so that a gradient is left everywhere.

        loss_i = softplus(margin + m_i / 2 - beta d_w) + softplus(margin + m_i / 2 + beta d_l)

    Args:
        chosen_logratios, rejected_logratios, margins, beta, margin: see :func:`apo_hinge_zero_loss`.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        "SoftPlus hinge" of Yao, Yuan and Chen, arXiv:2508.08466; ``beta`` is read off the name of their model.
    """
    check_range(0, math.inf, margin=margin)
    chosen, rejected = implicit_pair(beta, chosen_logratios, rejected_logratios)
    each = margin + _half(margins, chosen)
    return F.softplus(each - chosen) + F.softplus(each + rejected)


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    r"""APO for chosen responses better than the model's own: chosen up, rejected down, each on its own.

        loss_i = 1 - s(beta d_w) + s(beta d_l)

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
    Returns:
        ``(B,)`` losses in [0, 2].
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        D'Oosterlinck et al., arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = implicit_pair(beta, chosen_logratios, rejected_logratios)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    r"""APO for chosen responses worse than the model's own: both down, the rejected one further.

        loss_i = s(beta d_w) + 1 - s(beta d)

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
    Returns:
        ``(B,)`` losses in [0, 2].
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        D'Oosterlinck et al., arXiv:2408.06266, eq. 8.
    """
    gap = reward_gap(beta, chosen_logratios, rejected_logratios)
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-gap)


def hinge_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.1,
    width: float = 1.0,
) -> Tensor:
    r"""Linear penalty until the chosen response leads by ``width``, nothing beyond.

        loss_i = max(0, width + m_i - beta d_i)

    Args:
        chosen_logratios, rejected_logratios, margins, beta: see :func:`sigmoid_loss`.
        width: lead in implicit reward, at least 0.
    Returns:
        ``(B,)`` losses in units of reward.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Zhao et al., SLiC-HF, arXiv:2305.10425, in the form of RSO, arXiv:2309.06657, where ``width`` is 1.
    """
    check_range(0, math.inf, width=width)
    return F.relu(width - reward_gap(beta, chosen_logratios, rejected_logratios, margins))


def ipo_sum_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, margins: Tensor | None = None, *, beta: float = 0.1
) -> Tensor:
    r"""IPO as printed, on summed log-ratios.

        loss_i = (d_i - m_i / beta - 1 / (2 beta))^2

    Args:
        chosen_logratios, rejected_logratios, margins: see :func:`sigmoid_loss`.
        beta: see :func:`ipo_loss`.
    Returns:
        ``(B,)`` losses in nats squared.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Azar et al., arXiv:2310.12036, eq. 17.
    """
    return ((reward_gap(beta, chosen_logratios, rejected_logratios, margins) - 0.5) / beta) ** 2


def exo_pair_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, smoothing: float = 1e-3
) -> Tensor:
    r"""EXO: KL divergence from the model's preference q to the smoothed label, in the mode-seeking direction.

        loss_i = q log(q / (1 - smoothing)) + (1 - q) log((1 - q) / smoothing),   q = s(beta d_i)

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        smoothing: in (0, 0.5); at 0 the divergence is infinite.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Ji et al., arXiv:2402.00856, eq. 16.
    """
    check_positive(smoothing=smoothing)
    check_smoothing(smoothing)
    gap = reward_gap(beta, chosen_logratios, rejected_logratios)
    kept = torch.sigmoid(gap) * (F.logsigmoid(gap) - math.log1p(-smoothing))
    return kept + torch.sigmoid(-gap) * (F.logsigmoid(-gap) - math.log(smoothing))


def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.01) -> Tensor:
    r"""NCA for pairs: implicit rewards as classifiers of the policy against the reference.

        loss_i = -log s(R_w) - log s(-R_w) / 2 - log s(-R_l) / 2,   R = beta times the log-ratio

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Chen et al., arXiv:2402.05369, with two responses, of rewards 1 and 0 in the limit of low temperature.
    """
    chosen, rejected = implicit_pair(beta, chosen_logratios, rejected_logratios)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def robust_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    margins: Tensor | None = None,
    *,
    beta: float = 0.1,
    smoothing: float = 0.1,
) -> Tensor:
    r"""Robust DPO: an unbiased estimate of DPO's loss on clean labels, from labels swapped with a known chance.

        loss_i = (-(1 - smoothing) log s(beta d_i - m_i) + smoothing log s(-beta d_i - m_i)) / (1 - 2 smoothing)

    It has no lower bound: it falls without end as d grows.

    Args:
        chosen_logratios, rejected_logratios, margins, beta: see :func:`sigmoid_loss`; the margin is a handicap on the
            response that a term prefers, so that the mean over labels is that of DPO with its margin.
        smoothing: chance that a label is swapped, in [0, 0.5).
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Ray Chowdhury et al., arXiv:2403.00409.
    """
    check_smoothing(smoothing)
    right = F.logsigmoid(reward_gap(beta, chosen_logratios, rejected_logratios, margins))
    wrong = F.logsigmoid(reward_gap(beta, rejected_logratios, chosen_logratios, margins))
    return (smoothing * wrong - (1 - smoothing) * right) / (1 - 2 * smoothing)


def sppo_hard_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.001) -> Tensor:
    r"""SPPO with hard labels: regression of each log-ratio on its own target.

        loss_i = (d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2

    Args:
        chosen_logratios, rejected_logratios: see :func:`sigmoid_loss`.
        beta: 1 / eta in the paper.
    Returns:
        ``(B,)`` losses in nats squared.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Wu et al., arXiv:2405.00675, eq. 4.7 with win probabilities 1 and 0.
    """
    chosen, rejected = implicit_pair(beta, chosen_logratios, rejected_logratios)
    return ((chosen - 0.5) / beta) ** 2 + ((rejected + 0.5) / beta) ** 2


def discopop_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.05, tau: float = 0.05
) -> Tensor:
    r"""DiscoPOP ("log-ratio modulated"): a blend of the logistic and the exponential loss, found by search.

        loss_i = (1 - t) (-log s(l)) + t exp(-l),   l = beta d_i,  t = s(l / tau)

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        tau: width of the transition around l = 0, in units of reward. Above 1 the loss grows exponentially.
    Returns:
        ``(B,)`` losses.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Lu et al., arXiv:2406.08414, eq. 5.
    """
    check_positive(tau=tau)
    gap = reward_gap(beta, chosen_logratios, rejected_logratios)
    # t exp(-l) in one exponent: on badly ranked pairs the two factors alone are 0 and infinity.
    exponential = torch.exp(F.logsigmoid(gap / tau) - gap)
    return exponential - torch.sigmoid(-gap / tau) * F.logsigmoid(gap)


def ot_margin_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, margins: Tensor | None = None, *, beta: float = 0.1
) -> Tensor:
    r"""DPO that asks for a lead of ``margins``, as from optimal transport on the implicit rewards.

        loss_i = -log s(beta d_i - margins_i)

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        margins: ``(B,)`` in units of reward, or ``None`` for no margin. Gradients flow into it.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        None: it carries the margins of APLOT, arXiv:2510.10963, from reward models over to DPO, and is ours.
    """
    return -F.logsigmoid(reward_gap(beta, chosen_logratios, rejected_logratios, margins))


def madpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    data_margins: Tensor,
    *,
    beta: float = 0.1,
    largest: float = 2.0,
    smallest: float = 0.5,
    steepness: float = 1.0,
    threshold: float = 2.0,
) -> Tensor:
    r"""MADPO: DPO whose pairs count by what a reward model thinks of them: more where it sees little difference.

        loss_i = -w(h_i) log s(beta d_i),   w(h) = s(c h) / s(h) for h > -threshold, else 1
        c      = smallest + (largest - smallest) / (1 + (largest - 1) / (1 - smallest) exp(steepness (|h| - threshold)))

    c is near ``largest`` at small margins, 1 at the threshold and near ``smallest`` at large ones: the lead that is
    asked for is c h in the place of h. Pairs whose label the reward model contradicts count once.

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        data_margins: ``(B,)`` h in logits, the reward of the chosen response less that of the other. Held constant.
        largest: of c, above 1.
        smallest: of c, in (0, 1).
        steepness: of the way from one to the other, above 0.
        threshold: the margin that is taken as it is, above 0.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Rho, arXiv:2510.05342; formula and defaults are those of its code.
    """
    check_same_shape(chosen_logratios=chosen_logratios, data_margins=data_margins)
    weights = margin_weights(data_margins.detach(), largest, smallest, steepness, threshold)
    return -weights * F.logsigmoid(reward_gap(beta, chosen_logratios, rejected_logratios))


def margin_weights(margins: Tensor, largest: float, smallest: float, steepness: float, threshold: float) -> Tensor:
    """``(B,)`` the weights of :func:`madpo_loss`, whose arguments these are."""
    check_positive(smallest=smallest, steepness=steepness, threshold=threshold)
    if not smallest < 1 < largest:
        raise ValueError(f"expected smallest < 1 < largest, not smallest = {smallest} and largest = {largest}")
    ratio = (largest - 1) / (1 - smallest)
    lead = steepness * (margins.abs() - threshold) + math.log(ratio)
    factor = smallest + (largest - smallest) * torch.sigmoid(-lead)
    weights = torch.exp(F.logsigmoid(factor * margins) - F.logsigmoid(margins))
    return torch.where(margins > -threshold, weights, 1.0)


def reward_gap(
    beta: float, chosen_logratios: Tensor, rejected_logratios: Tensor, margins: Tensor | None = None
) -> Tensor:
    check_positive(beta=beta)
    check_same_shape(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios, margins=margins)
    gap = beta * (chosen_logratios - rejected_logratios)
    return gap if margins is None else gap - margins


def _half(margins: Tensor | None, values: Tensor) -> Tensor | float:
    check_same_shape(chosen_logratios=values, margins=margins)
    return 0.0 if margins is None else margins / 2


def implicit_pair(beta: float, chosen_logratios: Tensor, rejected_logratios: Tensor) -> tuple[Tensor, Tensor]:
    check_positive(beta=beta)
    check_same_shape(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    return beta * chosen_logratios, beta * rejected_logratios


def logistic_link(gap: Tensor, smoothing: float) -> Tensor:
    check_smoothing(smoothing)
    return -(1 - smoothing) * F.logsigmoid(gap) - smoothing * F.logsigmoid(-gap)


def check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 0.5:
        reason = "from 0.5 on, swapped labels would be as likely as right ones"
        raise ValueError(f"smoothing must be in [0, 0.5), not {smoothing}: {reason}")
