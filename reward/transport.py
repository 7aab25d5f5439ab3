"""Entropic optimal transport between two weighted sets: POT's log-domain Sinkhorn on torch tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.core.checks import check_finite, check_positive

CONVERGED_RESIDUAL = 1e-4
"""A plan counts as converged when at most this share of its unit mass misses its marginals."""


@dataclass(frozen=True)
class TransportPlan:
    """What :func:`sinkhorn_plan` found, and how far to trust it."""

    plan: Tensor
    """``(N, M)``, non-negative, of unit mass; rows and columns of weight 0 are exactly 0."""
    residual: float
    """Marginal error of ``plan``: the L1 distance to the row or the column weights, whichever is larger.
    A share of the unit mass, so comparable across sizes."""
    converged: bool
    """Whether ``residual`` is at most ``CONVERGED_RESIDUAL``."""
    iterations: int
    """Row and column updates that were run."""


@torch.no_grad()
def sinkhorn_plan(
    cost: Tensor,
    *,
    epsilon: float,
    max_iterations: int,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
) -> TransportPlan:
    r"""Cheapest coupling of rows and columns, blurred by entropy so that it is unique and smooth in ``cost``.

        plan = argmin_T  <T, cost> + epsilon <T, log T>     T 1 = row_weights,  T' 1 = column_weights

    Sweeps end early only when the marginals are met to rounding error, which is looked at every tenth sweep.
    Rows and columns of weight 0 are taken out before solving, so that padding may hold anything.

    Args:
        cost: ``(N, M)``; need not be square or non-negative. Solved in its own type if float64, else float32.
        epsilon: strength of the entropy, in units of ``cost``; 0.1 is smooth for costs of range 1.
        max_iterations: most row and column updates to run; small ``epsilon`` needs more.
        row_weights: ``(N,)`` non-negative, scaled to sum to 1; ``None`` for equal weights.
        column_weights: ``(M,)``, likewise.
    Returns:
        The plan without gradient, on the device of ``cost``.
    Raises:
        ValueError: if ``cost`` is empty, not a matrix or not finite where it counts, ``epsilon`` or
            ``max_iterations`` is not positive, or weights are negative, not finite, all 0 or too many or few.
    References:
        Cuturi (2013), arXiv:1306.0895; the solver is ``ot.bregman.sinkhorn_log`` of POT.
    """
    if cost.dim() != 2 or cost.numel() == 0:
        raise ValueError(f"'cost' must be a matrix with at least one entry, not of shape {tuple(cost.shape)}")
    check_positive(epsilon=epsilon, max_iterations=max_iterations)
    cost = cost.to(torch.float64 if cost.dtype == torch.float64 else torch.float32)
    rows = normalized_weights("row_weights", row_weights, cost.shape[0], like=cost)
    columns = normalized_weights("column_weights", column_weights, cost.shape[1], like=cost)
    kept = torch.outer(rows > 0, columns > 0)
    dense = cost[kept].view(int((rows > 0).sum()), -1)
    solution, iterations = _solve(dense, epsilon, max_iterations, rows[rows > 0], columns[columns > 0])
    plan = torch.zeros_like(cost).masked_scatter(kept, solution)
    residual = max(float((plan.sum(1) - rows).abs().sum()), float((plan.sum(0) - columns).abs().sum()))
    return TransportPlan(plan, residual, residual <= CONVERGED_RESIDUAL, iterations)


def normalized_weights(name: str, weights: Tensor | None, count: int, *, like: Tensor) -> Tensor:
    """Non-negative ``weights`` scaled to sum to 1, or equal ones, ``(count,)`` in the dtype of ``like``.

    Raises:
        ValueError: naming ``name``, if there are not ``count`` weights or they cannot be scaled to sum to 1.
    """
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=like.dtype, device=like.device)
    if tuple(weights.shape) != (count,):
        raise ValueError(f"'{name}' must have shape ({count},), not {tuple(weights.shape)}")
    weights = weights.to(device=like.device, dtype=torch.float64)
    check_finite(**{name: weights})
    if bool((weights < 0).any()):
        raise ValueError(f"'{name}' has {int((weights < 0).sum())} negative entries")
    if not bool((weights > 0).any()):
        raise ValueError(f"'{name}' are all 0: nothing to transport")
    return (weights / weights.sum()).to(like.dtype)


def _solve(cost: Tensor, epsilon: float, iterations: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
    from rlhf.core.pot import sinkhorn_log  # brings scipy along, which other margins have no use for

    check_finite(cost=cost)
    check_finite(cost_over_epsilon=cost / epsilon)
    rounding = torch.finfo(cost.dtype).eps
    # warn=False: the caller's residual says more than POT's warning, and where it is read.
    plan, log = sinkhorn_log(
        rows, columns, cost, epsilon, numItermax=iterations, stopThr=rounding, log=True, warn=False
    )
    return plan, log["niter"] + 1
