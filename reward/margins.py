"""Adaptive margins for preference pairs, from optimal transport between chosen and rejected responses.

Everything here runs without gradient, in float32 (float64 if an input is float64): to the loss, a margin is
a constant.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reward.tables import Reading, RewardCost
from reward.transport import normalized_weights, sinkhorn_plan
from rlhf.core.checks import check_finite, check_same_shape
from rlhf.core.errors import DataError


@dataclass(frozen=True)
class OptimalTransportMargins:
    """B margins and what they were made of: B chosen rows against N rejected columns."""

    margins: Tensor
    """``(B,)`` in logits, ``reward_terms`` plus ``semantic_terms``; 0 where the pair has weight 0."""
    cost: Tensor
    """``(B, N)`` difficulty of telling chosen i from rejected j; 0 where either has weight 0."""
    plan: Tensor
    """``(B, N)`` mass that the reading put on each cell; the Sinkhorn plan for "row" and "row_sum"."""
    residual: float
    """Marginal error of the Sinkhorn plan as a share of its mass; 0 for readings that solve none."""
    converged: bool
    """Whether ``residual`` is within the solver's tolerance; true for readings that solve no plan."""
    reward_terms: Tensor
    """``(B,)`` the part of each margin that comes from rewards."""
    semantic_terms: Tensor
    """``(B,)`` the part of each margin that comes from embeddings."""
    transport_cost: Tensor
    """Scalar, the cost summed over the cells as weighted by ``plan``."""
    rejected_rewards: Tensor
    """``(N,)`` rewards of the columns as they entered the cost (centered, if asked for). A queue that brings
    columns back later keeps the first B of these, with their embeddings."""

    @property
    def per_pair(self) -> Tensor:
        """``(B,)`` what was made."""
        return self.margins


@dataclass(frozen=True)
class PairCosts:
    """How hard it is to tell B chosen rows from N rejected columns."""

    reward_part: Tensor
    """``(B, N)``; 0 where row or column has weight 0."""
    semantic_part: Tensor
    """``(B, N)``, likewise."""
    rows: Tensor
    """``(B,)`` marginal of the rows, of sum 1."""
    columns: Tensor
    """``(N,)`` marginal of the columns, of sum 1."""
    rejected_rewards: Tensor
    """``(N,)`` rewards of the columns as they entered the cost."""


@torch.no_grad()
def optimal_transport_margins(
    chosen_embeddings: Tensor,
    rejected_embeddings: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    reward_weight: float = 0.9,
    semantic_weight: float = 0.1,
    epsilon: float = 0.1,
    max_iterations: int = 50,
    reward_cost: RewardCost = "abs",
    center_rewards: bool = True,
    reading: Reading = "row",
    chosen_weights: Tensor | None = None,
    rejected_weights: Tensor | None = None,
) -> OptimalTransportMargins:
    r"""Margins that grow with how hard a pair is to tell apart, judged against the other pairs at hand.

        C_ij = reward_weight R_ij + semantic_weight cos(e_i+, e_j-)
        R_ij = sigmoid(-|r_i+ - r_j-|)  for reward_cost "abs",   sigmoid(-(r_i+ - r_j-))  for "signed"
        T    = argmin <T, C> + epsilon <T, log T>
        m_i  = (sum_j T_ij C_ij) / (sum_j T_ij)

    Rejected row i is the partner of chosen row i. Further rejected rows (a queue of recent ones) only widen
    the plan. Hand over the pairs of all ranks: a plan per rank is another plan.

    Args:
        chosen_embeddings: ``(B, D)``, from where the reward is read. A zero vector has cosine 0 to all.
        rejected_embeddings: ``(N, D)`` with ``N >= B``.
        chosen_rewards: ``(B,)`` in logits.
        rejected_rewards: ``(N,)`` in logits; under ``center_rewards`` the rows past B must be centered already
            (keep :attr:`OptimalTransportMargins.rejected_rewards` in the queue, and they are).
        reward_weight: weight of the reward term.
        semantic_weight: weight of the semantic term.
        epsilon: entropy of the plan, in units of the cost (see :func:`reward.transport.sinkhorn_plan`).
        max_iterations: Sinkhorn iterations at most.
        reward_cost: "abs" gives a badly misranked pair as little margin as a well ranked one (robust to wrong
            labels), "signed" gives it the most.
        center_rewards: subtract from both rewards of a pair their mean, before any are compared across pairs.
            Bradley-Terry leaves that mean, an offset per prompt, undetermined.
        reading: "row": the formula above. "row_sum": without its denominator, so shrinking as 1/B. "pair":
            m_i = C_ii, no plan. "max": all mass on the hardest opponent, m_i = max_j C_ij.
        chosen_weights: ``(B,)`` marginal of the rows, by default equal; 0 marks padding, which may hold
            anything.
        rejected_weights: ``(N,)`` marginal of the columns, likewise.
    Returns:
        Margins and telemetry, detached. A row of weight 0 gets 0; so does, in "pair", one whose partner has.
    Raises:
        ValueError: on shapes that do not fit, non-finite rewards or embeddings of non-zero weight, an unknown
            option, or what :func:`reward.transport.sinkhorn_plan` refuses.
    References:
        APLOT, Li et al. (EMNLP 2025), arXiv:2510.10963. Cost, epsilon, iterations and the row-wise reading follow
        a third-party replication (Lin et al., "From Soft Targets to Reward Signals", App. A.3), which is
        ``center_rewards=False``. Row normalization, centering, "signed" and the other readings are ours: see
        docs/papers.md.
    """
    costs = pair_costs(
        chosen_embeddings,
        rejected_embeddings,
        chosen_rewards,
        rejected_rewards,
        reward_weight=reward_weight,
        semantic_weight=semantic_weight,
        reward_cost=reward_cost,
        center_rewards=center_rewards,
        chosen_weights=chosen_weights,
        rejected_weights=rejected_weights,
    )
    reward_part, semantic_part, rows, columns = costs.reward_part, costs.semantic_part, costs.rows, costs.columns
    cost = reward_part + semantic_part
    plan, residual, converged = _coupling(reading, cost, rows, columns, epsilon, max_iterations)
    shares = plan if reading == "row_sum" else _row_normalized(plan)
    reward_terms, semantic_terms = (shares * reward_part).sum(1), (shares * semantic_part).sum(1)
    return OptimalTransportMargins(
        margins=reward_terms + semantic_terms,
        cost=cost,
        plan=plan,
        residual=residual,
        converged=converged,
        reward_terms=reward_terms,
        semantic_terms=semantic_terms,
        transport_cost=(plan * cost).sum(),
        rejected_rewards=costs.rejected_rewards,
    )


@torch.no_grad()
def pair_costs(
    chosen_embeddings: Tensor,
    rejected_embeddings: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    reward_weight: float,
    semantic_weight: float,
    reward_cost: RewardCost,
    center_rewards: bool,
    chosen_weights: Tensor | None = None,
    rejected_weights: Tensor | None = None,
) -> PairCosts:
    """The two terms of the cost of :func:`optimal_transport_margins`, whose arguments these are.

    Raises:
        ValueError: on shapes that do not fit, non-finite rewards or embeddings of non-zero weight, or an unknown
            option.
    """
    _check_shapes(chosen_embeddings, rejected_embeddings, chosen_rewards, rejected_rewards)
    dtype = _working_dtype(chosen_embeddings, rejected_embeddings, chosen_rewards, rejected_rewards)
    chosen_embeddings, rejected_embeddings = chosen_embeddings.to(dtype), rejected_embeddings.to(dtype)
    chosen, rejected = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    rows = normalized_weights("chosen_weights", chosen_weights, len(chosen), like=chosen)
    columns = normalized_weights("rejected_weights", rejected_weights, len(rejected), like=chosen)
    check_finite(
        chosen_embeddings=chosen_embeddings[rows > 0],
        rejected_embeddings=rejected_embeddings[columns > 0],
        chosen_rewards=chosen[rows > 0],
        rejected_rewards=rejected[columns > 0],
    )
    if center_rewards:
        chosen, rejected = _center_pairs(chosen, rejected)
        # A partner of weight 0 was not looked at above, but has entered its pair's mean.
        check_finite(centered_chosen_rewards=chosen[rows > 0], centered_rejected_rewards=rejected[columns > 0])
    unused = ~torch.outer(rows > 0, columns > 0)
    difficulty = _reward_difficulty(chosen[:, None] - rejected[None, :], reward_cost)
    reward_part = (reward_weight * difficulty).masked_fill(unused, 0)
    cosines = _cosines(chosen_embeddings, rejected_embeddings)
    semantic_part = (semantic_weight * cosines).masked_fill(unused, 0)
    return PairCosts(reward_part, semantic_part, rows, columns, rejected)


def no_margins(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """``(B,)`` zeros."""
    return constant_margins(chosen_rewards, rejected_rewards, constant=0.0)


def constant_margins(chosen_rewards: Tensor, rejected_rewards: Tensor, *, constant: float = 0.5) -> Tensor:
    """``(B,)`` margins that are all ``constant``, in logits.

    Raises:
        ValueError: if the shapes of the ``(B,)`` rewards differ.
    """
    check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return torch.full_like(chosen_rewards, constant)


def column_margins(data_margins: Tensor) -> Tensor:
    """``(B,)`` margins of the data, NaN where a row has none.

    Raises:
        DataError: if there is such a row.
    """
    if torch.isnan(data_margins).any():
        raise DataError(
            "margin.kind = column, but some training rows have neither a margin nor both scores; "
            "name the columns in data.columns.margin or data.columns.chosen_score and rejected_score"
        )
    return data_margins


@torch.no_grad()
def similarity_margins(
    chosen_embeddings: Tensor, rejected_embeddings: Tensor, *, semantic_weight: float = 0.1
) -> Tensor:
    """``(B,)`` margins ``semantic_weight cos(e_i+, e_i-)`` from ``(B, D)`` embeddings; a zero vector gives 0.

    Raises:
        ValueError: if the shapes differ or an embedding is not finite.
    """
    check_same_shape(chosen_embeddings=chosen_embeddings, rejected_embeddings=rejected_embeddings)
    check_finite(chosen_embeddings=chosen_embeddings, rejected_embeddings=rejected_embeddings)
    return semantic_weight * cosines(chosen_embeddings, rejected_embeddings)


def cosines(chosen_embeddings: Tensor, rejected_embeddings: Tensor) -> Tensor:
    """``(B,)`` cosines of pairs of ``(B, D)`` embeddings; 0 for a zero vector, not a number where one is not finite."""
    dtype = _working_dtype(chosen_embeddings, rejected_embeddings)
    unit_chosen = F.normalize(chosen_embeddings.to(dtype), dim=-1)
    return (unit_chosen * F.normalize(rejected_embeddings.to(dtype), dim=-1)).sum(-1)


@torch.no_grad()
def reward_margins(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    reward_weight: float = 0.9,
    reward_cost: RewardCost = "abs",
) -> Tensor:
    """``(B,)`` margins ``reward_weight R_ii`` from each pair's own rewards ``(B,)``: large at a small gap.

    With :func:`similarity_margins` added this is the "pair" reading of :func:`optimal_transport_margins`.

    Raises:
        ValueError: if the shapes differ, a reward is not finite or ``reward_cost`` is unknown.
    """
    check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check_finite(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    dtype = _working_dtype(chosen_rewards, rejected_rewards)
    gap = chosen_rewards.to(dtype) - rejected_rewards.to(dtype)
    return reward_weight * _reward_difficulty(gap, reward_cost)


def _check_shapes(
    chosen_embeddings: Tensor, rejected_embeddings: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor
) -> None:
    shapes = {
        "chosen_embeddings": tuple(chosen_embeddings.shape),
        "rejected_embeddings": tuple(rejected_embeddings.shape),
        "chosen_rewards": tuple(chosen_rewards.shape),
        "rejected_rewards": tuple(rejected_rewards.shape),
    }
    rows, columns = shapes["chosen_embeddings"], shapes["rejected_embeddings"]
    fits = (
        len(rows) == len(columns) == 2
        and rows[1] == columns[1]
        and shapes["chosen_rewards"] == rows[:1]
        and shapes["rejected_rewards"] == columns[:1]
        and 0 < rows[0] <= columns[0]
    )
    if not fits:
        listing = ", ".join(f"'{name}': {shape}" for name, shape in shapes.items())
        expected = "embeddings (B, D) and (N, D), rewards (B,) and (N,), 0 < B <= N"
        raise ValueError(f"expected {expected}; got {listing}")


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _center_pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    pairs = len(chosen)
    half_gap = (chosen - rejected[:pairs]) / 2
    return half_gap, torch.cat([-half_gap, rejected[pairs:]])


def _reward_difficulty(gap: Tensor, reward_cost: RewardCost) -> Tensor:
    # 1 - sigmoid(x) is written sigmoid(-x), which keeps its digits where x is large.
    if reward_cost == "abs":
        return torch.sigmoid(-gap.abs())
    if reward_cost == "signed":
        return torch.sigmoid(-gap)
    raise ValueError(f"reward_cost must be 'abs' or 'signed', not {reward_cost!r}")


def _cosines(chosen: Tensor, rejected: Tensor) -> Tensor:
    # Under autocast the product would be taken in half precision.
    with torch.autocast(chosen.device.type, enabled=False):
        return F.normalize(chosen, dim=-1) @ F.normalize(rejected, dim=-1).T


def _coupling(
    reading: Reading, cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float, max_iterations: int
) -> tuple[Tensor, float, bool]:
    """The mass that ``reading`` puts on each cell, with row sums ``rows``; then residual and convergence."""
    if reading in ("row", "row_sum"):
        found = sinkhorn_plan(
            cost, epsilon=epsilon, max_iterations=max_iterations, row_weights=rows, column_weights=columns
        )
        return found.plan, found.residual, found.converged
    if reading == "pair":
        opponents = torch.arange(len(rows), device=cost.device)
    elif reading == "max":
        opponents = cost.masked_fill(columns == 0, -torch.inf).argmax(dim=1)
    else:
        raise ValueError(f"reading must be 'row', 'row_sum', 'pair' or 'max', not {reading!r}")
    return torch.zeros_like(cost).scatter(1, opponents[:, None], rows[:, None]), 0.0, True


def _row_normalized(plan: Tensor) -> Tensor:
    mass = plan.sum(dim=1, keepdim=True)
    return torch.where(mass > 0, plan / mass, 0)
