"""Objectives of preference optimisation, unreduced; :mod:`policy.preference.objectives` has the table of names.

Inputs, ``(B,)`` each: ``chosen_logprobs`` and ``rejected_logprobs``, in nats, summed over response tokens;
``chosen_logratios`` (d_w) and ``rejected_logratios`` (d_l), the same less the reference model's, d = d_w - d_l;
``chosen_lengths`` (n_w) and ``rejected_lengths`` (n_l), response tokens, at least 1; s is the sigmoid.

Some formulas hold a mean or a sort over the batch. Such a loss takes that statistic, over the pairs of all
micro-batches and ranks, as an argument, and holds it constant; each pair then has the gradient of the whole-batch
formula, however the batch was cut. ``None`` stands for "this call holds the whole batch".
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.core.checks import check_positive, check_range, check_same_shape

MAX_EXPONENT = 10.0
"""Of AMaPO's margin: at exp(10) a per-token gap is so far below it that a larger one changes no gradient."""


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, smoothing: float = 0.0
) -> Tensor:
    r"""DPO: logistic regression on the gap between two implicit rewards; with ``smoothing``, cDPO.

        loss_i = -(1 - smoothing) log s(beta d_i) - smoothing log s(-beta d_i),   d = d_w - d_l

    Args:
        chosen_logratios: ``(B,)`` in nats, log pi(y_w) / pi_ref(y_w), summed over response tokens.
        rejected_logratios: the same of y_l.
        beta: implicit reward per nat.
        smoothing: share of labels expected to be swapped, in [0, 0.5).
    Returns:
        ``(B,)`` losses in nats, unreduced: averaging over pairs and ranks is the caller's choice.
    Raises:
        ValueError: if the shapes differ, ``(B,)`` and ``(B, 1)`` among them, or a number is out of range.
    References:
        Rafailov et al., arXiv:2305.18290, eq. 7; smoothing: Mitchell, "A note on DPO with noisy preferences" (2023).
    """
    return _link(_gap(beta, chosen_logratios, rejected_logratios), smoothing)


def margin_sigmoid_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float = 0.1,
    delta: float = 0.1,
    smoothing: float = 0.1,
) -> Tensor:
    r"""Adaptive Margin-Sigmoid: both terms of cDPO, each cut off once it is below ``delta``.

        loss_i = (1 - smoothing) max(0, l+ - delta) + smoothing max(0, l- - delta),   l+- = -log s(+-beta d_i)

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        delta: in nats, in [0, log 2); 0 is cDPO. A schedule passes each step's value.
        smoothing: see :func:`sigmoid_loss`.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Yao, Yuan and Chen, arXiv:2508.08466, which states neither ``delta`` nor ``smoothing``: these defaults are ours.
    """
    if not 0 <= delta < math.log(2):
        reason = "training starts at d = 0, where both terms are log 2: a larger delta would leave no gradient"
        raise ValueError(f"delta must be in [0, log 2), not {delta}: {reason}")
    _check_smoothing(smoothing)
    gap = _gap(beta, chosen_logratios, rejected_logratios)
    kept, swapped = F.relu(-F.logsigmoid(gap) - delta), F.relu(-F.logsigmoid(-gap) - delta)
    return (1 - smoothing) * kept + smoothing * swapped


def apo_hinge_zero_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, margin: float = 1.0
) -> Tensor:
    r"""Hinges that push the chosen response above the reference and the rejected one below it.

        loss_i = max(0, margin - beta d_w) + max(0, margin + beta d_l)

    A response whose log-ratio has reached margin / beta on its side has no gradient.

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        margin: implicit reward asked for on each side, at least 0.
    Returns:
        ``(B,)`` losses in units of reward.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        "APO-hinge-zero" of Yao, Yuan and Chen, arXiv:2508.08466.
    """
    check_range(0, math.inf, margin=margin)
    chosen, rejected = _rewards(beta, chosen_logratios, rejected_logratios)
    return F.relu(margin - chosen) + F.relu(margin + rejected)


def apo_softplus_zero_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.3, margin: float = 1.0
) -> Tensor:
    r""":func:`apo_hinge_zero_loss` with softplus for the hinges, so that a gradient is left everywhere.

        loss_i = softplus(margin - beta d_w) + softplus(margin + beta d_l)

    Args:
        chosen_logratios, rejected_logratios, beta, margin: see :func:`apo_hinge_zero_loss`.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        "SoftPlus hinge" of Yao, Yuan and Chen, arXiv:2508.08466; ``beta`` is read off the name of their model.
    """
    check_range(0, math.inf, margin=margin)
    chosen, rejected = _rewards(beta, chosen_logratios, rejected_logratios)
    return F.softplus(margin - chosen) + F.softplus(margin + rejected)


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
    chosen, rejected = _rewards(beta, chosen_logratios, rejected_logratios)
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
    gap = _gap(beta, chosen_logratios, rejected_logratios)
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-gap)


def hinge_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, width: float = 1.0
) -> Tensor:
    r"""Linear penalty until the chosen response leads by ``width``, nothing beyond.

        loss_i = max(0, width - beta d_i)

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        width: lead in implicit reward, at least 0.
    Returns:
        ``(B,)`` losses in units of reward.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Zhao et al., SLiC-HF, arXiv:2305.10425, in the form of RSO, arXiv:2309.06657, where ``width`` is 1.
    """
    check_range(0, math.inf, width=width)
    return F.relu(width - _gap(beta, chosen_logratios, rejected_logratios))


def ipo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    r"""IPO on log-ratios per token: regression of the gap on a fixed target, which it does not run past.

        loss_i = (d_w / n_w - d_l / n_l - 1 / (2 beta))^2

    Args:
        chosen_logratios, rejected_logratios: see :func:`sigmoid_loss`.
        chosen_lengths, rejected_lengths: ``(B,)`` response tokens, at least 1.
        beta: strength of the regularisation, tau in the paper.
    Returns:
        ``(B,)`` losses in nats per token, squared.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Azar et al., arXiv:2310.12036, eq. 17, which does not name the averaging; TRL has it from the authors.
    """
    check_positive(beta=beta)
    gap = _average_gap(
        chosen_lengths, rejected_lengths, chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios
    )
    return (gap - 0.5 / beta) ** 2


def ipo_sum_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    r"""IPO as printed, on summed log-ratios.

        loss_i = (d_i - 1 / (2 beta))^2

    Args:
        chosen_logratios, rejected_logratios: see :func:`sigmoid_loss`.
        beta: see :func:`ipo_loss`.
    Returns:
        ``(B,)`` losses in nats squared.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Azar et al., arXiv:2310.12036, eq. 17.
    """
    return ((_gap(beta, chosen_logratios, rejected_logratios) - 0.5) / beta) ** 2


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
    _check_smoothing(smoothing)
    gap = _gap(beta, chosen_logratios, rejected_logratios)
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
    chosen, rejected = _rewards(beta, chosen_logratios, rejected_logratios)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def robust_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, smoothing: float = 0.1
) -> Tensor:
    r"""Robust DPO: an unbiased estimate of DPO's loss on clean labels, from labels swapped with a known chance.

        loss_i = (-(1 - smoothing) log s(beta d_i) + smoothing log s(-beta d_i)) / (1 - 2 smoothing)

    It has no lower bound: it falls without end as d grows.

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        smoothing: chance that a label is swapped, in [0, 0.5).
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Ray Chowdhury et al., arXiv:2403.00409.
    """
    _check_smoothing(smoothing)
    gap = _gap(beta, chosen_logratios, rejected_logratios)
    return (smoothing * F.logsigmoid(-gap) - (1 - smoothing) * F.logsigmoid(gap)) / (1 - 2 * smoothing)


def bco_pair_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    mean_logratio: Tensor | float | None = None,
    beta: float = 0.1,
) -> Tensor:
    r"""BCO on pairs: a classifier of good against bad whose logit is the implicit reward, shifted.

        loss_i = -log s(R_w - shift) - log s(-(R_l - shift)),   R = beta times the log-ratio

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        mean_logratio: running mean of (d_w + d_l) / 2 over all pairs; ``None``: that of this call. shift = beta
            times it.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Jung et al., arXiv:2404.04656. TRL 1.16's "bco_pair" has no shift: ``mean_logratio=0`` here.
    """
    chosen, rejected = _rewards(beta, chosen_logratios, rejected_logratios)
    shift = beta * _constant(mean_logratio, (chosen_logratios + rejected_logratios) / 2, torch.mean)
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


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
    chosen, rejected = _rewards(beta, chosen_logratios, rejected_logratios)
    return ((chosen - 0.5) / beta) ** 2 + ((rejected + 0.5) / beta) ** 2


def aot_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    matched_reference: Tensor | None = None,
    beta: float = 0.01,
    smoothing: float = 0.0,
) -> Tensor:
    r"""AOT, paired: the policy's gaps should dominate the reference's as distributions, quantile by quantile.

        sum_i loss_i = sum_k link(beta (pi_(k) - ref_(k))),   link(x) = -(1 - smoothing) log s(x) - smoothing log s(-x)

    with pi_(k) and ref_(k) the sorted gaps log pi(y_w) - log pi(y_l) under policy and reference.

    Args:
        chosen_logprobs, rejected_logprobs: ``(B,)`` in nats, summed over response tokens.
        chosen_logratios, rejected_logratios, beta, smoothing: see :func:`sigmoid_loss`.
        matched_reference: ``(B,)``, the reference's gap of the same rank as this pair's under the policy; ``None``:
            ranked within this call.
    Returns:
        ``(B,)`` losses in nats, pair i's being the term of its own rank.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Melnyk et al., arXiv:2406.05882. TRL sorts within a device.
    """
    check_positive(beta=beta)
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        matched_reference=matched_reference,
    )
    gap = chosen_logprobs - rejected_logprobs
    if matched_reference is None:
        matched_reference = matched(gap, gap - (chosen_logratios - rejected_logratios))
    return _link(beta * (gap - matched_reference.detach()), smoothing)


def aot_unpaired_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    matched_rejected: Tensor | None = None,
    matched_chosen: Tensor | None = None,
    beta: float = 0.01,
    smoothing: float = 0.0,
) -> Tensor:
    r"""AOT, unpaired: chosen log-ratios should dominate rejected ones as distributions, quantile by quantile.

        sum_i loss_i = sum_k link(beta (w_(k) - l_(k))),   link as in :func:`aot_loss`

    with w_(k) and l_(k) the sorted log-ratios. Pair i has the value of the term that holds its d_w, and the
    gradients of that term in its d_w and of the term that holds its d_l in its d_l.

    Args:
        chosen_logratios, rejected_logratios, beta, smoothing: see :func:`sigmoid_loss`.
        matched_rejected: ``(B,)``, the rejected log-ratio of the same rank as this pair's chosen one.
        matched_chosen: ``(B,)``, the chosen log-ratio of the same rank as this pair's rejected one. ``None`` for
            both: ranked within this call.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ, only one of the two is given or a number is out of range.
    References:
        Melnyk et al., arXiv:2406.05882. TRL sorts within a device.
    """
    if (matched_rejected is None) != (matched_chosen is None):
        raise ValueError("give both matched_rejected and matched_chosen, or neither")
    check_positive(beta=beta)
    check_same_shape(
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        matched_rejected=matched_rejected,
        matched_chosen=matched_chosen,
    )
    if matched_rejected is None or matched_chosen is None:
        matched_rejected = matched(chosen_logratios, rejected_logratios)
        matched_chosen = matched(rejected_logratios, chosen_logratios)
    of_chosen = _link(beta * (chosen_logratios - matched_rejected.detach()), smoothing)
    of_rejected = _link(beta * (matched_chosen.detach() - rejected_logratios), smoothing)
    return of_chosen + (of_rejected - of_rejected.detach())


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
    gap = _gap(beta, chosen_logratios, rejected_logratios)
    # t exp(-l) in one exponent: on badly ranked pairs the two factors alone are 0 and infinity.
    exponential = torch.exp(F.logsigmoid(gap / tau) - gap)
    return exponential - torch.sigmoid(-gap / tau) * F.logsigmoid(gap)


def sigmoid_norm_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 5.0,
) -> Tensor:
    r"""Length-normalised DPO.

        loss_i = -log s(beta (d_w / n_w - d_l / n_l))

    Args:
        chosen_logratios, rejected_logratios, chosen_lengths, rejected_lengths: see :func:`ipo_loss`.
        beta: implicit reward per nat per token.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Tulu 3, arXiv:2411.15124, with its ``beta``.
    """
    check_positive(beta=beta)
    gap = _average_gap(
        chosen_lengths, rejected_lengths, chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios
    )
    return -F.logsigmoid(beta * gap)


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    r"""SimPO: log-probability per token as the reward, no reference model, and a target margin.

        loss_i = -log s(beta (logp_w / n_w - logp_l / n_l) - gamma)

    Args:
        chosen_logprobs, rejected_logprobs: ``(B,)`` in nats, summed over response tokens.
        chosen_lengths, rejected_lengths: see :func:`ipo_loss`.
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
    gap = _average_gap(
        chosen_lengths, rejected_lengths, chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    return -F.logsigmoid(beta * gap - gamma)


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
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    r"""CPO: DPO with a uniform reference, plus the likelihood of the chosen response.

        loss_i = link(beta (logp_w - logp_l)) - nll_weight logp_w / n_w,   link as in :func:`aot_loss`

    Args:
        chosen_logprobs, rejected_logprobs: ``(B,)`` in nats, summed over response tokens.
        chosen_lengths: ``(B,)`` response tokens, at least 1.
        beta, smoothing: see :func:`sigmoid_loss`.
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
    preference = _link(beta * (chosen_logprobs - rejected_logprobs), smoothing)
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
    *,
    beta: float = 0.1,
    alpha: float = 0.005,
) -> Tensor:
    r"""R-DPO: DPO for a reward that charges ``alpha`` per token of response.

        loss_i = -log s(beta d_i + alpha (n_w - n_l))

    The optimum for reward r - alpha n has r = beta log(pi / pi_ref) + alpha n + const, which gives the sign: a chosen
    response that is longer needs less of a lead, so that length is not learned from it.

    Args:
        chosen_logratios, rejected_logratios, chosen_lengths, rejected_lengths: see :func:`ipo_loss`.
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
    gap = _gap(beta, chosen_logratios, rejected_logratios)
    check_same_shape(
        chosen_logratios=chosen_logratios, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    return -F.logsigmoid(gap + alpha * (chosen_lengths - rejected_lengths))


def amapo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    mean_gap: Tensor | float | None = None,
    gap_deviation: Tensor | float | None = None,
    beta: float = 2.0,
) -> Tensor:
    r"""AMaPO: SimPO with a margin only for pairs ranked worse than the average, more for worse ones.

        loss_i = -log s(beta (D_i - m_i)),   D = logp_w / n_w - logp_l / n_l
        m_i    = exp(mean_gap (mean_gap - D_i) / gap_deviation) where D_i < mean_gap, else 0;  no gradient

    While most pairs are misranked, mean_gap is negative, and pairs that are worse get less of a margin.

    Args:
        chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths, beta: see :func:`simpo_loss`.
        mean_gap, gap_deviation: mean and standard deviation of D over the batch; ``None``: those of this call.
            Deviation 0 means no margin.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Deng et al., arXiv:2511.09385. Ours: the deviation divides by B where their code divides by B - 1, so that
        one pair has no margin instead of NaN; the exponent stops at :data:`MAX_EXPONENT`.
    """
    check_positive(beta=beta)
    gap = _average_gap(
        chosen_lengths, rejected_lengths, chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    mean = _constant(mean_gap, gap, torch.mean)
    scores = _zscore(gap, mean, _constant(gap_deviation, gap, deviation))
    margins = torch.exp((-scores * mean).clamp(max=MAX_EXPONENT))
    return -F.logsigmoid(beta * (gap - torch.where(scores < 0, margins, 0.0)))


def alpha_dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    mean_shift: Tensor | float | None = None,
    shift_deviation: Tensor | float | None = None,
    beta: float = 10.0,
    gamma_ratio: float = 0.4,
    alpha: float = 0.1,
) -> Tensor:
    r"""AlphaDPO: SimPO whose margin grows with how far policy and reference already differ on the pair.

        loss_i = -log s(beta (D_i - gamma_ratio - alpha (g_i - mean_shift) / shift_deviation))
        D = logp_w / n_w - logp_l / n_l,   g = d_w / n_w - d_l / n_l;   the margin has no gradient

    Args:
        chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths, beta: see :func:`simpo_loss`.
        chosen_logratios, rejected_logratios: see :func:`sigmoid_loss`.
        mean_shift, shift_deviation: moving averages of the mean and the standard deviation of g over the batch;
            ``None``: those of this call. Deviation 0 means no adaptive part.
        gamma_ratio: the fixed part of the margin, in nats per token.
        alpha: the adaptive part, in nats per token for one standard deviation.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``beta`` is not positive.
    References:
        Wu et al., arXiv:2410.10148, normalised as in their code, which has beta 10 with gamma_ratio .4 and alpha .05
        to .2. Ours: the deviation divides by B, theirs by B - 1.
    """
    check_positive(beta=beta)
    gap = _average_gap(
        chosen_lengths, rejected_lengths, chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    shift = _average_gap(
        chosen_lengths, rejected_lengths, chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios
    )
    mean, spread = _constant(mean_shift, shift, torch.mean), _constant(shift_deviation, shift, deviation)
    return -F.logsigmoid(beta * (gap - gamma_ratio - alpha * _zscore(shift, mean, spread)))


def gamma_po_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    targets: Tensor | None = None,
    beta: float = 0.1,
    gamma: float = 0.1,
    tau: float = 10.0,
) -> Tensor:
    r"""gammaPO on DPO: a fixed total of margin, dealt out so that pairs with a clear lead get more of it.

        loss_i = -log s(beta d_i - (targets_i - gamma))

    Args:
        chosen_logratios, rejected_logratios, beta: see :func:`sigmoid_loss`.
        targets: ``(B,)`` from :func:`gamma_targets` on the gaps beta d of the batch; ``None``: of this call.
        gamma: mean of the targets, in units of reward.
        tau: pull towards equal targets.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Sun et al., arXiv:2506.03690; that ``gamma`` is taken off again, so that margins average 0, is their code's.
        It draws up to 256 gaps, from a queue of 2048; here they are those of the batch.
    """
    gap = _gap(beta, chosen_logratios, rejected_logratios)
    check_same_shape(chosen_logratios=chosen_logratios, targets=targets)
    if targets is None:
        targets = gamma_targets(gap, gamma=gamma, tau=tau)
    return -F.logsigmoid(gap - (targets.detach() - gamma))


def kto_loss(
    logratios: Tensor,
    labels: Tensor,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""KTO: single responses, labelled good or bad, valued against a reference point as prospect theory has it.

        loss_i = desirable_weight (1 - s(beta (d_i - z)))      where labels_i
                 undesirable_weight (1 - s(beta (z - d_i)))    elsewhere;   z = max(0, kl)

    Args:
        logratios: ``(B,)`` in nats, log pi(y) / pi_ref(y), summed over response tokens.
        labels: ``(B,)`` bool, True on good responses.
        kl: mean log-ratio, over the batch, of responses paired with prompts they do not answer. Held constant, and
            without default: it cannot be had from the other arguments, and 0 is another loss.
        beta: see :func:`sigmoid_loss`.
        desirable_weight, undesirable_weight: of the two kinds, at least 0.
    Returns:
        ``(B,)`` losses, in the order of the rows.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Ethayarajh et al., arXiv:2402.01306, eq. 7.
    """
    check_positive(beta=beta)
    check_range(0, math.inf, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    check_same_shape(logratios=logratios, labels=labels)
    reference_point = torch.as_tensor(kl, dtype=logratios.dtype, device=logratios.device).detach().clamp(min=0)
    lead = logratios - reference_point
    desirable, undesirable = torch.sigmoid(-beta * lead), torch.sigmoid(beta * lead)
    return torch.where(labels, desirable_weight * desirable, undesirable_weight * undesirable)


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
    gap = _gap(beta, chosen_logratios, rejected_logratios)
    check_same_shape(chosen_logratios=chosen_logratios, margins=margins)
    return -F.logsigmoid(gap if margins is None else gap - margins)


def matched(values: Tensor, others: Tensor) -> Tensor:
    """For each of ``values``, the one of ``others`` that has the same rank; of equal ones the first ranks first.

    Args:
        values, others: ``(N,)``.
    Returns:
        ``(N,)``, no gradient: ``others`` rearranged as the optimal transport on the line does.
    Raises:
        ValueError: if the shapes differ.
    """
    check_same_shape(values=values, others=others)
    ranks = values.detach().argsort(stable=True).argsort()
    return others.detach().sort().values[ranks]


def gamma_targets(gaps: Tensor, *, gamma: float, tau: float, steps: int = 20) -> Tensor:
    r"""gammaPO's target margins: gamma N p, with p a distribution over the pairs that minimises

        mean_i softplus(gamma N p_i - gaps_i) + tau KL(p || uniform)

    by exponentiated gradient from uniform, with step size min(0.5 / tau, 1). Each step shortens the way to the
    minimum by about min(0.5, tau), so that 20 steps are ample unless tau is far below 0.5.

    Args:
        gaps: ``(N,)`` in units of reward.
        gamma: mean of the targets, positive.
        tau: pull towards equal targets, positive.
        steps: of the iteration.
    Returns:
        ``(N,)``, no gradient; they add up to gamma N.
    Raises:
        ValueError: if a number is not positive.
    References:
        Sun et al., arXiv:2506.03690, as in their code, but in log p, which needs no guard against p = 0, and from
        the last p, where it takes the last but one.
    """
    check_positive(gamma=gamma, tau=tau)
    gaps, total, step = gaps.detach(), gamma * len(gaps), min(0.5 / tau, 1.0)
    log_p = torch.full_like(gaps, -math.log(len(gaps)))
    for _ in range(steps):
        gradient = gamma * torch.sigmoid(total * log_p.exp() - gaps) + tau * (1 + math.log(len(gaps)) + log_p)
        log_p = F.log_softmax(log_p - step * gradient, dim=0)
    return total * log_p.exp()


def deviation(values: Tensor) -> Tensor:
    """Standard deviation of a population: 0, not NaN, for one value."""
    return values.std(correction=0)


def _gap(beta: float, chosen_logratios: Tensor, rejected_logratios: Tensor) -> Tensor:
    check_positive(beta=beta)
    check_same_shape(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    return beta * (chosen_logratios - rejected_logratios)


def _rewards(beta: float, chosen_logratios: Tensor, rejected_logratios: Tensor) -> tuple[Tensor, Tensor]:
    check_positive(beta=beta)
    check_same_shape(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    return beta * chosen_logratios, beta * rejected_logratios


def _average_gap(chosen_lengths: Tensor, rejected_lengths: Tensor, **pair: Tensor) -> Tensor:
    """Difference per token of ``pair``, two tensors whose names a refusal repeats, the chosen one first."""
    check_same_shape(**pair, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    chosen, rejected = pair.values()
    return chosen / chosen_lengths - rejected / rejected_lengths


def _link(gap: Tensor, smoothing: float) -> Tensor:
    _check_smoothing(smoothing)
    return -(1 - smoothing) * F.logsigmoid(gap) - smoothing * F.logsigmoid(-gap)


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 0.5:
        reason = "from 0.5 on, swapped labels would be as likely as right ones"
        raise ValueError(f"smoothing must be in [0, 0.5), not {smoothing}: {reason}")


def _log_odds(average: Tensor) -> Tensor:
    # A response of probability 1 has infinite odds, and their gradient is NaN: stop at the last number below 1.
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    return average - torch.log(-torch.expm1(average))


def _constant(given: Tensor | float | None, values: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """The statistic as given, or that of ``values`` where they are the whole batch; no gradient."""
    value = statistic(values) if given is None else torch.as_tensor(given, dtype=values.dtype, device=values.device)
    return value.detach()


def _zscore(values: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    return torch.where(spread > 0, (values.detach() - mean) / spread, 0.0)
