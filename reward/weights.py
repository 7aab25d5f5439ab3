"""Weights of pairs by partial optimal transport: what fits worst stays behind.

Everything here runs without gradient, in float32 (float64 if an input is float64): to the loss, a weight is a constant.
"""

from dataclasses import dataclass

from torch import Tensor

from reward.margins import constant_margins, pair_costs
from reward.tables import RewardCost
from reward.transport import partial_plan


@dataclass(frozen=True)
class TransportWeights:
    """B weights and what they were made of: B chosen rows against N rejected columns."""

    weights: Tensor
    """``(B,)``, not negative; their mean is 1 where there is no queue."""
    plan: Tensor
    """``(B, N)``, of the mass asked for."""
    residual: float
    """See :func:`reward.transport.partial_plan`."""
    rejected_rewards: Tensor
    """``(N,)`` rewards of the columns as they entered the cost."""

    @property
    def per_pair(self) -> Tensor:
        """``(B,)`` what was made."""
        return self.weights


def transport_weights(
    chosen_embeddings: Tensor,
    rejected_embeddings: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    mass: float = 0.8,
    reward_weight: float = 0.9,
    semantic_weight: float = 0.1,
    epsilon: float = 0.1,
    max_iterations: int = 200,
    reward_cost: RewardCost = "signed",
    center_rewards: bool = True,
) -> TransportWeights:
    r"""Weights of pairs: how much of a pair's two answers the cheapest plan of a share ``mass`` takes along.

        T    = argmin <T, C> + epsilon <T, log T>   over plans of that mass, with rows <= 1/B and columns <= 1/N
        w_i  = (B sum_j T_ij + N sum_j T_ji) / (2 mass),   C as for margins

    With the signed cost a chosen answer of low reward and a rejected one of high reward fit nowhere, so that a pair
    whose label the model contradicts counts less, the more so the smaller the mass.

    Args:
        chosen_embeddings, rejected_embeddings, chosen_rewards, rejected_rewards, reward_weight, semantic_weight,
            center_rewards: see :func:`reward.margins.optimal_transport_margins`; further rejected rows widen the plan.
        mass: the share that is taken along, in (0, 1]; 1 gives every pair the weight 1.
        epsilon: entropy of the plan, in units of the cost.
        max_iterations: see :func:`reward.transport.partial_plan`.
        reward_cost: "signed"; with "abs", pairs of a small gap stay behind whichever way they are ranked.
    Raises:
        ValueError: on what :func:`reward.margins.pair_costs` or :func:`reward.transport.partial_plan` refuse.
    References:
        Ours; partial transport: Benamou et al. (2015), arXiv:1412.5154.
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
    )
    cost = costs.reward_part + costs.semantic_part
    found = partial_plan(cost, mass=mass, epsilon=epsilon, max_iterations=max_iterations)
    pairs, columns = cost.shape
    weights = (pairs * found.plan.sum(1) + columns * found.plan.sum(0)[:pairs]) / (2 * mass)
    return TransportWeights(weights, found.plan, found.residual, costs.rejected_rewards)


def no_weights(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """``(B,)`` ones: every pair counts once.

    Raises:
        ValueError: if the shapes of the ``(B,)`` rewards differ.
    """
    return constant_margins(chosen_rewards, rejected_rewards, constant=1.0)
