"""Losses of reward models on preference pairs, unreduced; :data:`reward.tables.LOSSES` names them.

Some formulas hold a mean over the batch. Such a loss takes that mean, over the pairs of all micro-batches and
ranks, as an argument; each pair then has the gradient of the whole-batch formula, however the batch was cut.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.core.checks import check_positive, check_range, check_same_shape


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> Tensor:
    r"""Negative log-likelihood that ``chosen`` outscores ``rejected`` by at least ``margins``.

        loss_i = -log sigmoid(chosen_i - rejected_i - margins_i)

    Args:
        chosen: ``(B,)`` rewards of the preferred responses, in logits.
        rejected: ``(B,)`` rewards of the other responses, in logits.
        margins: ``(B,)`` in logits, or ``None`` for no margin. Gradients flow into it; pass
            ``margins.detach()`` to hold it constant.
    Returns:
        ``(B,)`` losses in nats, unreduced: averaging over pairs and ranks is the caller's choice.
    Raises:
        ValueError: if the shapes differ; ``(B,)`` and ``(B, 1)`` would broadcast to ``(B, B)``.
    References:
        Bradley and Terry (1952); the margin: Llama 2, arXiv:2307.09288, eq. 2.
    """
    return -F.logsigmoid(_gap(chosen, rejected, margins))


def label_smoothing_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, smoothing: float = 0.1
) -> Tensor:
    r"""Bradley-Terry that expects a share ``smoothing`` of the labels to be swapped.

        loss_i = -(1 - smoothing) log sigmoid(d_i) - smoothing log sigmoid(-d_i),  d as in Bradley-Terry

    Smallest at ``d = log((1 - smoothing) / smoothing)``, so gaps do not grow without bound.

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`. The margin shifts both terms.
        smoothing: in [0, 0.5).
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``smoothing`` is out of range.
    References:
        The "labelsmooth" baseline of GRM, arXiv:2406.10216; a margin in both terms: the code of SimPO,
        arXiv:2405.14734.
    """
    check_range(0, 0.5, smoothing=smoothing)
    gap = _gap(chosen, rejected, margins)
    return -(1 - smoothing) * F.logsigmoid(gap) - smoothing * F.logsigmoid(-gap)


def generalized_cross_entropy_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, q: float = 0.7
) -> Tensor:
    r"""Bradley-Terry whose gradient fades where the model is sure that the label is wrong.

        loss_i = (1 - p_i^q) / q,   p = sigmoid(chosen - rejected - margins)

    The gradient is ``p_i^q`` times that of Bradley-Terry. No loss exceeds ``1 / q``.

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`.
        q: in (0, 1]: towards 0 Bradley-Terry, at 1 the mean absolute error of p, which wrong labels move least and
            hard pairs teach least.
    Returns:
        ``(B,)`` losses.
    Raises:
        ValueError: if the shapes differ or ``q`` is out of range.
    References:
        Zhang and Sabuncu (NeurIPS 2018), arXiv:1805.07836, eq. 6.
    """
    check_positive(q=q)
    if q > 1:
        raise ValueError(f"q must be at most 1, not {q}")
    return -torch.expm1(q * F.logsigmoid(_gap(chosen, rejected, margins))) / q


def robust_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, wrong_share: float = 0.1
) -> Tensor:
    r"""Bradley-Terry corrected backward: over labels that are wrong by chance, its mean is that over right ones.

        loss_i = ((1 - e) l(chosen_i, rejected_i) - e l(rejected_i, chosen_i)) / (1 - 2 e),   e = wrong_share
        l(a, b) = -log sigmoid(a - b - margins_i)

    Falls without bound as the gap grows, at a slope of e / (1 - 2 e).

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`. The margin is a handicap on the answer that ``l``
            prefers, in either term.
        wrong_share: of the labels, in [0, 0.5).
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``wrong_share`` is out of range.
    References:
        Natarajan et al. (NeurIPS 2013), lemma 1; for preferences: Chowdhury et al., arXiv:2403.00409.
    """
    check_range(0, 0.5, wrong_share=wrong_share)
    right, wrong = bradley_terry_loss(chosen, rejected, margins), bradley_terry_loss(rejected, chosen, margins)
    return ((1 - wrong_share) * right - wrong_share * wrong) / (1 - 2 * wrong_share)


def forward_robust_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, wrong_share: float = 0.1
) -> Tensor:
    r"""Bradley-Terry corrected forward: the likelihood of labels of which a share is wrong.

        loss_i = -log((1 - e) sigmoid(chosen_i - rejected_i - margins_i)
                      + e sigmoid(rejected_i - chosen_i - margins_i)),   e = wrong_share

    Without margins no loss exceeds ``-log e``: a pair that the model is sure of has no say.

    Args:
        chosen, rejected, margins, wrong_share: see :func:`robust_loss`.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or ``wrong_share`` is out of range.
    References:
        Patrini et al. (CVPR 2017), arXiv:1609.03683, theorem 2.
    """
    check_range(0, 0.5, wrong_share=wrong_share)
    right, wrong = bradley_terry_loss(chosen, rejected, margins), bradley_terry_loss(rejected, chosen, margins)
    if wrong_share == 0:
        return right
    return -torch.logaddexp(math.log1p(-wrong_share) - right, math.log(wrong_share) - wrong)


def hinge_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, width: float = 1.0
) -> Tensor:
    r"""Linear penalty until ``chosen`` leads by ``width + margins``, nothing beyond.

        loss_i = max(0, width + margins_i - (chosen_i - rejected_i))

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`.
        width: the lead asked for without a margin, in logits; 0 leaves it to ``margins`` alone.
    Returns:
        ``(B,)`` losses in logits.
    Raises:
        ValueError: if the shapes differ or ``width`` is negative.
    References:
        ``width=1``: RSO, arXiv:2309.06657, on rewards; ``width=0``: the hinge baseline of arXiv:2505.07271.
    """
    check_range(0, math.inf, width=width)
    return F.relu(width - _gap(chosen, rejected, margins))


def focal_loss(chosen: Tensor, rejected: Tensor, *, gamma: float = 2.0) -> Tensor:
    r"""Bradley-Terry that fades out for pairs the model already ranks well.

        loss_i = -(1 - 2 max(0, p_i - 1/2))^gamma log p_i,   p = sigmoid(chosen - rejected)

    Takes no margin: the factor is about p as a probability of ranking correctly, which a margin would move.

    Args:
        chosen, rejected: see :func:`bradley_terry_loss`.
        gamma: how fast; 0 is Bradley-Terry.
    Returns:
        ``(B,)`` losses in nats. Gradients flow through the factor too.
    Raises:
        ValueError: if the shapes differ or ``gamma`` is negative.
    References:
        The focal ranking loss of InternLM2, arXiv:2403.17297, without its separate log-barrier penalty.
    """
    check_range(0, math.inf, gamma=gamma)
    gap = _gap(chosen, rejected, None)
    # 1 - 2 max(0, sigmoid(d) - 1/2) is 2 sigmoid(-max(0, d)), which keeps its digits where d is large.
    return -((2 * torch.sigmoid(-F.relu(gap))) ** gamma) * F.logsigmoid(gap)


def pos_reg_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    *,
    mean_chosen: Tensor | float | None = None,
    weight: float = 0.1,
) -> Tensor:
    r"""Bradley-Terry that also pulls the mean chosen reward up, so that rewards do not drift below 0.

        batch loss = mean_i(-log sigmoid(chosen_i - rejected_i - margins_i))
                     - weight log sigmoid(mean_i chosen_i)

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`.
        mean_chosen: mean of ``chosen`` over all pairs of the batch; ``None``: this call holds them all.
        weight: of the second term.
    Returns:
        ``(B,)`` losses in nats whose mean over the batch has the value and the gradient of the batch loss.
    Raises:
        ValueError: if the shapes differ or ``weight`` is negative.
    References:
        The "pos_reg" baseline in the code of GRM, arXiv:2406.10216.
    """
    check_range(0, math.inf, weight=weight)
    reward = F.logsigmoid(_as_mean(chosen, mean_chosen))
    return bradley_terry_loss(chosen, rejected, margins) - weight * reward


def centering_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, coefficient: float = 0.01
) -> Tensor:
    r"""Bradley-Terry that also keeps the two rewards of a pair centered on 0.

        loss_i = -log sigmoid(chosen_i - rejected_i - margins_i) + coefficient (chosen_i + rejected_i)^2

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`.
        coefficient: of the second term.
    Returns:
        ``(B,)`` losses.
    Raises:
        ValueError: if the shapes differ or ``coefficient`` is negative.
    References:
        Eisenstein et al., "Helping or Herding?", arXiv:2312.09244.
    """
    check_range(0, math.inf, coefficient=coefficient)
    return bradley_terry_loss(chosen, rejected, margins) + coefficient * (chosen + rejected) ** 2


def norm_bt_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    *,
    distances: Tensor,
    mean_distance: Tensor | float | None = None,
    max_weight: float = 10.0,
) -> Tensor:
    r"""Bradley-Terry in which pairs with close representations count as much as pairs far apart.

        loss_i = -min(max_weight, mean_distance / distances_i) log sigmoid(chosen_i - rejected_i - margins_i)

    The gradient of a linear head grows with the distance of its two inputs; the factor takes that out.

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`.
        distances: ``(B,)`` Euclidean, between the representations that the head reads. Held constant.
        mean_distance: running mean (see :func:`moving_average`) over all pairs; ``None``: that of this call.
        max_weight: cap on the factor, for pairs whose distance is next to 0. Ours: the sources name none.
    Returns:
        ``(B,)`` losses.
    Raises:
        ValueError: if the shapes differ or ``max_weight`` is not positive.
    References:
        NormBT, Xie et al., arXiv:2512.06343.
    """
    check_same_shape(chosen=chosen, distances=distances)
    check_positive(max_weight=max_weight)
    distances, mean = distances.detach(), _constant_mean(distances, mean_distance)
    factor = torch.where(distances * max_weight > mean, mean / distances, max_weight)
    return factor * bradley_terry_loss(chosen, rejected, margins)


def bsr_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    *,
    mean_reward: Tensor | float | None = None,
    pairs: Tensor | float | None = None,
    coefficient: float = 0.001,
) -> Tensor:
    r"""Bradley-Terry with batch-wise sum-to-zero regularization: all rewards of a batch should cancel out.

        batch loss = mean_i(-log sigmoid(chosen_i - rejected_i - margins_i))
                     + coefficient B (mean reward)^2

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`.
        mean_reward: mean over the 2B rewards of the batch; ``None``: this call holds them all.
        pairs: B, the pairs of the batch; ``None``: those of this call.
        coefficient: of the second term.
    Returns:
        ``(B,)`` losses whose mean over the batch has the value and the gradient of the batch loss.
    Raises:
        ValueError: if the shapes differ or ``coefficient`` is negative.
    References:
        Hong et al. (ICML 2025), arXiv:2505.07271. Their code takes B and the mean per device; here both are
        of the whole batch.
    """
    check_range(0, math.inf, coefficient=coefficient)
    losses = bradley_terry_loss(chosen, rejected, margins)
    pairs = len(chosen) if pairs is None else pairs
    return losses + coefficient * pairs * _as_mean((chosen + rejected) / 2, mean_reward) ** 2


def grm_sft_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    *,
    chosen_logprobs: Tensor,
    weight: float = 0.01,
    beta: float = 0.1,
) -> Tensor:
    r"""Bradley-Terry regularized by language modeling of the chosen responses (GRM, "sft").

        loss_i = -(1 - weight) log sigmoid(chosen_i - rejected_i - margins_i)
                 - weight log sigmoid(beta chosen_logprobs_i)

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`.
        chosen_logprobs: ``(B,)`` in nats, of each chosen response under the language-model head, summed.
        weight: share of the second term, in [0, 1).
        beta: scale of the log-probabilities.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ or a number is out of range.
    References:
        Yang et al. (NeurIPS 2024), arXiv:2406.10216; the log-sigmoid form is that of their code's default.
    """
    check_same_shape(chosen=chosen, chosen_logprobs=chosen_logprobs)
    return _regularized(bradley_terry_loss(chosen, rejected, margins), chosen_logprobs, weight, beta)


def grm_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    *,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    reference_chosen_logprobs: Tensor | None = None,
    reference_rejected_logprobs: Tensor | None = None,
    weight: float = 0.01,
    beta: float = 0.1,
) -> Tensor:
    r"""Bradley-Terry regularized by DPO through the language-model head (GRM, "dpo").

        loss_i = -(1 - weight) log sigmoid(chosen_i - rejected_i - margins_i) - weight log sigmoid(beta l_i)
        l      = chosen_logprobs - rejected_logprobs, less the same difference under the reference

    Args:
        chosen, rejected, margins: see :func:`bradley_terry_loss`; the margin is not applied to ``l``.
        chosen_logprobs, rejected_logprobs: ``(B,)``, see :func:`grm_sft_loss`.
        reference_chosen_logprobs, reference_rejected_logprobs: the same under a reference model, or ``None``
            for both: no reference.
        weight: share of the second term, in [0, 1).
        beta: scale of the log-probabilities.
    Returns:
        ``(B,)`` losses in nats.
    Raises:
        ValueError: if the shapes differ, only one reference is given or a number is out of range.
    References:
        Yang et al. (NeurIPS 2024), arXiv:2406.10216; without reference is their code's default.
    """
    if (reference_chosen_logprobs is None) != (reference_rejected_logprobs is None):
        raise ValueError("give both reference_chosen_logprobs and reference_rejected_logprobs, or neither")
    check_same_shape(
        chosen=chosen,
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        reference_chosen_logprobs=reference_chosen_logprobs,
        reference_rejected_logprobs=reference_rejected_logprobs,
    )
    lead = chosen_logprobs - rejected_logprobs
    if reference_chosen_logprobs is not None and reference_rejected_logprobs is not None:
        lead = lead - (reference_chosen_logprobs - reference_rejected_logprobs)
    return _regularized(bradley_terry_loss(chosen, rejected, margins), lead, weight, beta)


def moving_average(previous: float | None, value: float, *, decay: float = 0.9) -> float:
    """``decay * previous + (1 - decay) * value``, or ``value`` at the start: NormBT's running mean distance.

    Raises:
        ValueError: if ``decay`` is not in [0, 1).
    """
    check_range(0, 1, decay=decay)
    return value if previous is None else decay * previous + (1 - decay) * value


def _gap(chosen: Tensor, rejected: Tensor, margins: Tensor | None) -> Tensor:
    check_same_shape(chosen=chosen, rejected=rejected, margins=margins)
    gap = chosen - rejected
    return gap if margins is None else gap - margins


def _as_mean(values: Tensor, mean: Tensor | float | None) -> Tensor:
    """``(B,)`` copies of the batch mean, each passing its gradient to its own pair.

    For any f, the mean over the batch of f of these has value f(mean) and, in each of ``values``, gradient
    f'(mean) / B: those of f of the batch mean.
    """
    return _constant_mean(values, mean) + (values - values.detach())


def _constant_mean(values: Tensor, mean: Tensor | float | None) -> Tensor:
    mean = values.mean() if mean is None else torch.as_tensor(mean, dtype=values.dtype, device=values.device)
    return mean.detach()


def _regularized(loss: Tensor, logprobs: Tensor, weight: float, beta: float) -> Tensor:
    check_range(0, 1, weight=weight)
    check_positive(beta=beta)
    return (1 - weight) * loss - weight * F.logsigmoid(beta * logprobs)


STATISTICS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean_chosen": lambda chosen, rejected, distances: chosen,
    "mean_reward": lambda chosen, rejected, distances: (chosen + rejected) / 2,
    "mean_distance": lambda chosen, rejected, distances: distances,
}
"""Batch means that losses take: of which per-pair value, given chosen and rejected rewards and distances."""
