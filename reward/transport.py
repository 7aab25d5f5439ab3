"""Entropic optimal transport between two weighted sets: all of the mass (POT's Sinkhorn), or the cheapest part."""

import math
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
    """``(N, M)``, non-negative, of unit mass or of the mass asked for; rows and columns of weight 0 are exactly 0."""
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


@torch.no_grad()
def partial_plan(
    cost: Tensor,
    *,
    mass: float,
    epsilon: float,
    max_iterations: int,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
) -> TransportPlan:
    r"""Cheapest coupling of a share ``mass`` of rows and columns, blurred by entropy: what is costly stays behind.

        plan = argmin_T  <T, cost> + epsilon <T, log T>     T 1 <= row_weights,  T' 1 <= column_weights,  1' T 1 = mass

    Solved in the dual: ``T_ij = exp((f_i + g_j + h - cost_ij) / epsilon)``, where f and g are at most 0, and 0 where
    a row or column is not used up. Each in turn takes the best value there is for it, given the others.

    Args:
        cost, epsilon, max_iterations, row_weights, column_weights: see :func:`sinkhorn_plan`.
        mass: of the plan, in (0, 1]; at 1 it is that of :func:`sinkhorn_plan`.
    Returns:
        The plan without gradient. Its residual is what rows or columns hold above their weights, or what the sum misses
        of ``mass``, whichever is largest.
    Raises:
        ValueError: as :func:`sinkhorn_plan`, and if ``mass`` is not in (0, 1].
    References:
        Benamou et al. (2015), arXiv:1412.5154, section 5, whose scalings are these.
    """
    if cost.dim() != 2 or cost.numel() == 0:
        raise ValueError(f"'cost' must be a matrix with at least one entry, not of shape {tuple(cost.shape)}")
    check_positive(epsilon=epsilon, max_iterations=max_iterations, mass=mass)
    if mass > 1:
        raise ValueError(f"mass must be at most 1, not {mass}")
    cost = cost.to(torch.float64 if cost.dtype == torch.float64 else torch.float32)
    rows = normalized_weights("row_weights", row_weights, cost.shape[0], like=cost)
    columns = normalized_weights("column_weights", column_weights, cost.shape[1], like=cost)
    kept = torch.outer(rows > 0, columns > 0)
    check_finite(cost=cost[kept])
    kernel = torch.where(kept, -cost / epsilon, -torch.inf)
    f, g, total = torch.zeros_like(rows), torch.zeros_like(columns), math.log(mass)
    h = total - kernel.flatten().logsumexp(0)
    iterations = 0
    for iterations in range(1, max_iterations + 1):  # noqa: B007
        before = f, g, h
        f = (rows.log() - (kernel + g + h).logsumexp(1)).nan_to_num(nan=0.0).clamp(max=0)
        g = (columns.log() - (kernel + f[:, None] + h).logsumexp(0)).nan_to_num(nan=0.0).clamp(max=0)
        h = total - (kernel + f[:, None] + g).flatten().logsumexp(0)
        moved = max(float((new - old).abs().max()) for new, old in zip((f, g, h), before, strict=True))
        if moved <= 4 * torch.finfo(cost.dtype).eps:
            break
    plan = (kernel + f[:, None] + g + h).exp()
    excess = [(plan.sum(1) - rows).clamp(min=0).sum(), (plan.sum(0) - columns).clamp(min=0).sum()]
    residual = max(float(max(excess)), abs(float(plan.sum()) - mass))
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
