"""Objectives that hold a mean or a sort over the batch; see :mod:`policy.preference.pair_losses` for the inputs.

Such a loss takes that statistic, over the pairs of all
micro-batches and ranks, as an argument, and holds it constant; each pair then has the gradient of the whole-batch
formula, however the batch was cut. ``None`` stands for "this call holds the whole batch".
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.preference.length_losses import average_gap
from policy.preference.pair_losses import implicit_pair, logistic_link, reward_gap
from rlhf.core.checks import check_positive, check_range, check_same_shape

Columns = Mapping[str, Tensor]
Parameters = Mapping[str, float]

MAX_EXPONENT = 10.0
"""Largest exponent in AMaPO's margin: a per-token gap is so far below exp(10) that more changes no gradient."""


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
    chosen, rejected = implicit_pair(beta, chosen_logratios, rejected_logratios)
    shift = beta * _constant(mean_logratio, (chosen_logratios + rejected_logratios) / 2, torch.mean)
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


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
    return logistic_link(beta * (gap - matched_reference.detach()), smoothing)


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
    of_chosen = logistic_link(beta * (chosen_logratios - matched_rejected.detach()), smoothing)
    of_rejected = logistic_link(beta * (matched_chosen.detach() - rejected_logratios), smoothing)
    return of_chosen + (of_rejected - of_rejected.detach())


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
    gap = average_gap(
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
        Wu et al., arXiv:2410.10148, normalized as in their code, which has beta 10 with gamma_ratio .4 and alpha .05
        to .2. Ours: the deviation divides by B, theirs by B - 1.
    """
    check_positive(beta=beta)
    gap = average_gap(
        chosen_lengths, rejected_lengths, chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    shift = average_gap(
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
    gap = reward_gap(beta, chosen_logratios, rejected_logratios)
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
    r"""KTO: single responses, labeled good or bad, valued against a reference point as prospect theory has it.

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


def matched(values: Tensor, others: Tensor) -> Tensor:
    """``others`` rearranged to have the ranks of ``values``, place by place; of equal ones the first ranks first.

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
    r"""gammaPO's target margins: gamma N p, with p a distribution over the pairs that minimizes

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


def _constant(given: Tensor | float | None, values: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """The statistic as given, or that of ``values`` where they are the whole batch; no gradient."""
    value = statistic(values) if given is None else torch.as_tensor(given, dtype=values.dtype, device=values.device)
    return value.detach()


def _zscore(values: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    return torch.where(spread > 0, (values.detach() - mean) / spread, 0.0)


def _logratio_gap(columns: Columns) -> Tensor:
    return columns["chosen_logratios"] - columns["rejected_logratios"]


def _matched_reference(columns: Columns, parameters: Parameters) -> Tensor:
    policy = columns["chosen_logprobs"] - columns["rejected_logprobs"]
    return matched(policy, policy - _logratio_gap(columns))


def _per_token_gap(columns: Columns, kind: Literal["logprobs", "logratios"]) -> Tensor:
    chosen = columns[f"chosen_{kind}"] / columns["chosen_lengths"]
    return chosen - columns[f"rejected_{kind}"] / columns["rejected_lengths"]


STATISTICS: Mapping[str, Callable[[Columns, Parameters], Tensor]] = {
    "mean_logratio": lambda columns, _: (columns["chosen_logratios"] + columns["rejected_logratios"]).mean() / 2,
    "matched_reference": _matched_reference,
    "matched_rejected": lambda columns, _: matched(columns["chosen_logratios"], columns["rejected_logratios"]),
    "matched_chosen": lambda columns, _: matched(columns["rejected_logratios"], columns["chosen_logratios"]),
    "mean_gap": lambda columns, _: _per_token_gap(columns, "logprobs").mean(),
    "gap_deviation": lambda columns, _: deviation(_per_token_gap(columns, "logprobs")),
    "mean_shift": lambda columns, _: _per_token_gap(columns, "logratios").mean(),
    "shift_deviation": lambda columns, _: deviation(_per_token_gap(columns, "logratios")),
    "targets": lambda columns, parameters: gamma_targets(
        parameters["beta"] * _logratio_gap(columns), gamma=parameters["gamma"], tau=parameters["tau"]
    ),
    "kl": lambda columns, _: columns["mismatched_logratios"].mean(),
}
"""What losses take of the whole batch, from the ``(N,)`` columns of all its pairs and the loss's parameters: either
one number, or ``(N,)`` values of which each pair takes its own. Columns are what objectives take as inputs; "kl" reads
"mismatched_logratios", those of responses paired with prompts they do not answer."""

RUNNING: Mapping[str, Literal["mean", "ema"]] = {
    "mean_logratio": "mean",
    "mean_shift": "ema",
    "shift_deviation": "ema",
}
"""Statistics that the caller carries over from batch to batch: as the mean over all pairs so far, or as a moving
average (decay 0.9 in the paper's code). Without that, each batch stands for itself."""
