"""What the margins of one training step look like, as plain numbers for a log."""

import math

import torch
from torch import Tensor

from reward.margins import OptimalTransportMargins, similarity_margins
from rlhf.core.checks import check_finite, check_same_shape

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


@torch.no_grad()
def margin_telemetry(
    margins: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    chosen_embeddings: Tensor | None = None,
    rejected_embeddings: Tensor | None = None,
    cosines: Tensor | None = None,
    transport: OptimalTransportMargins | None = None,
) -> dict[str, float]:
    """Summarize the margins of B pairs; every value is finite, and what is undefined is left out.

    Always there: ``margin/mean``, ``margin/p10``, ``margin/p50``, ``margin/p90`` and
    ``margin/misranked_share`` (pairs with ``chosen < rejected``; ties do not count). Where they are defined,
    Pearson correlations: ``margin/gap_correlation`` (of the margin with chosen minus rejected) and, given
    embeddings, ``margin/similarity_correlation`` (with the cosine of the pair's embeddings). They are
    undefined, and absent, for one pair and where either quantity is the same in all pairs.

    With ``transport``: ``margin/reward_term_*`` and ``margin/semantic_term_*`` (mean and quantiles of the two
    parts of the margin before scale and warm-up), ``margin/transport_cost``, ``margin/residual`` and
    ``margin/converged`` (1 or 0).

    Args:
        margins: ``(B,)`` in logits, as subtracted in the loss: after scale and warm-up.
        chosen_rewards: ``(B,)`` in logits.
        rejected_rewards: ``(B,)`` in logits; without the extra columns of a queue.
        chosen_embeddings: ``(B, D)``, or ``None``; given for both sides or neither.
        rejected_embeddings: ``(B, D)``, likewise.
        cosines: ``(B,)`` of the pairs' embeddings, where these are not given.
        transport: what :func:`reward.margins.optimal_transport_margins` returned for these B pairs.
    Raises:
        ValueError: shapes that differ, embeddings for one side only, non-finite values, or no pair.
    """
    columns = _columns(margins, chosen_rewards, rejected_rewards, transport)
    if (chosen_embeddings is None) != (rejected_embeddings is None):
        raise ValueError("embeddings are given for one side only; the similarity of a pair needs both")
    if not len(margins):
        raise ValueError("there are no pairs to summarize")
    columns = {name: values.double() for name, values in columns.items()}
    if chosen_embeddings is not None and rejected_embeddings is not None:
        cosines = _cosines(chosen_embeddings, rejected_embeddings, margins)
    if cosines is not None:
        check_same_shape(margins=margins, cosines=cosines)
        columns["cosine"] = cosines.double()
    check_finite(**columns)
    return _on_host(_measures(columns) | _plan_measures(transport, like=columns["margin"]))


def _columns(
    margins: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    transport: OptimalTransportMargins | None,
) -> dict[str, Tensor]:
    named = {"margins": margins, "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    columns = {"margin": margins}
    if transport is not None:
        named["transport.margins"] = transport.margins
        columns |= {"reward_term": transport.reward_terms, "semantic_term": transport.semantic_terms}
    check_same_shape(**named)
    if margins.dim() != 1:
        raise ValueError(f"expected one margin for each pair, shape (B,); got {tuple(margins.shape)}")
    return columns | {"gap": chosen_rewards.double() - rejected_rewards.double()}


def _cosines(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    if chosen.dim() != 2 or len(chosen) != len(margins):
        raise ValueError(f"'chosen_embeddings': {tuple(chosen.shape)} do not fit {len(margins)} margins")
    check_same_shape(chosen_embeddings=chosen, rejected_embeddings=rejected)
    return similarity_margins(chosen, rejected, semantic_weight=1.0).double()


def _measures(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    margin, gap = columns["margin"], columns["gap"]
    measures = {"margin/misranked_share": (gap < 0).double().mean()}
    for name, prefix in (
        ("margin", ""),
        ("reward_term", "reward_term_"),
        ("semantic_term", "semantic_term_"),
    ):
        if name in columns:
            measures[f"margin/{prefix}mean"] = columns[name].mean()
            for label, share in QUANTILES.items():
                measures[f"margin/{prefix}{label}"] = columns[name].quantile(share)
    measures["margin/gap_correlation"] = _correlation(margin, gap)
    if "cosine" in columns:
        measures["margin/similarity_correlation"] = _correlation(margin, columns["cosine"])
    return measures


def _plan_measures(transport: OptimalTransportMargins | None, *, like: Tensor) -> dict[str, Tensor]:
    if transport is None:
        return {}
    check_finite(transport_cost=transport.transport_cost)
    return {
        "margin/transport_cost": transport.transport_cost.to(like),
        "margin/residual": like.new_tensor(transport.residual),
        "margin/converged": like.new_tensor(float(transport.converged)),
    }


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation, or NaN where it is undefined."""
    # Asked of the values: rounding in the mean gives constants a tiny variance and a random correlation.
    if bool(first.min() == first.max()) or bool(second.min() == second.max()):
        return first.new_tensor(math.nan)
    first, second = first - first.mean(), second - second.mean()
    return (first * second).sum() / (first.norm() * second.norm())


def _on_host(measures: dict[str, Tensor]) -> dict[str, float]:
    """One copy from the device for all values; the inputs were finite, so NaN marks the undefined."""
    values = torch.stack(list(measures.values())).tolist()
    return {name: value for name, value in zip(measures, values, strict=True) if not math.isnan(value)}
