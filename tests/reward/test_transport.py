import math
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from reward.transport import CONVERGED_RESIDUAL, partial_plan, sinkhorn_plan
from reward.weights import transport_weights


def random_cost(rows, columns, seed=0, dtype=torch.float64):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_weights(count, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (3, 8), (9, 2)])
def test_the_plan_is_the_one_of_the_plain_sinkhorn_solver(rows, columns):
    cost, a, b = random_cost(rows, columns), random_weights(rows, 1), random_weights(columns, 2)
    found = sinkhorn_plan(cost, epsilon=0.1, max_iterations=500, row_weights=a, column_weights=b)
    expected = ot.sinkhorn(
        (a / a.sum()).numpy(),
        (b / b.sum()).numpy(),
        cost.numpy(),
        0.1,
        method="sinkhorn",
        numItermax=5000,
        stopThr=1e-15,
        warn=False,
    )
    torch.testing.assert_close(found.plan, torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert found.converged


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_unconverged_iterations_are_those_of_a_loop_in_the_plain_domain(iterations):
    cost = random_cost(4, 6)
    kernel, left = np.exp(-cost.numpy() / 0.05), np.ones(4)
    for _ in range(iterations):
        right = (1 / 6) / (kernel.T @ left)
        left = (1 / 4) / (kernel @ right)
    found = sinkhorn_plan(cost, epsilon=0.05, max_iterations=iterations)
    expected = torch.from_numpy(left[:, None] * kernel * right)
    torch.testing.assert_close(found.plan, expected, rtol=0, atol=1e-14)
    assert found.iterations == iterations
    assert found.residual == pytest.approx(float((expected.sum(0) - 1 / 6).abs().sum()), rel=1e-6)


def test_the_plan_tends_to_the_exact_one_as_epsilon_vanishes():
    cost = random_cost(6, 6, seed=3)
    uniform = np.full(6, 1 / 6)
    exact = torch.from_numpy(ot.emd(uniform, uniform, cost.numpy()))
    errors = [
        float((sinkhorn_plan(cost, epsilon=epsilon, max_iterations=2000).plan - exact).abs().sum())
        for epsilon in (0.1, 0.03, 0.01)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 5e-3


@given(
    cost=npst.arrays(
        np.float64, npst.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-1, 1, width=32)
    ),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_marginals_are_met_and_zero_weights_take_no_mass(cost, data):
    weight = st.one_of(st.just(0.0), st.floats(0.125, 8))
    a, b = (
        torch.tensor(data.draw(st.lists(weight, min_size=n, max_size=n).filter(any)), dtype=torch.float64)
        for n in cost.shape
    )
    found = sinkhorn_plan(
        torch.from_numpy(cost), epsilon=0.5, max_iterations=2000, row_weights=a, column_weights=b
    )
    torch.testing.assert_close(found.plan.sum(1), a / a.sum(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.plan.sum(0), b / b.sum(), rtol=0, atol=1e-9)
    assert found.plan.min() >= 0
    assert found.plan[a == 0].abs().sum() == 0
    assert found.plan[:, b == 0].abs().sum() == 0
    assert found.converged


def test_rows_and_columns_of_weight_zero_may_hold_anything_and_change_nothing():
    cost = random_cost(3, 4)
    padded = torch.full((5, 6), math.nan, dtype=torch.float64)
    rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 2, 3, 5])
    padded[rows[:, None], columns] = cost
    a, b = torch.zeros(5), torch.zeros(6)
    a[rows], b[columns] = 1, 1
    found = sinkhorn_plan(padded, epsilon=0.1, max_iterations=50, row_weights=a, column_weights=b)
    expected = sinkhorn_plan(cost, epsilon=0.1, max_iterations=50)
    torch.testing.assert_close(found.plan[rows[:, None], columns], expected.plan, rtol=0, atol=1e-15)
    assert float(found.plan.sum()) == pytest.approx(1)


def test_a_plan_that_misses_its_marginals_says_so_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sinkhorn_plan(random_cost(8, 8), epsilon=0.002, max_iterations=10)
    missed = float((found.plan.sum(0) - 1 / 8).abs().sum())
    assert not found.converged
    assert found.residual == pytest.approx(missed)
    assert found.residual > 100 * CONVERGED_RESIDUAL


def test_iterations_end_early_only_when_the_marginals_are_met_to_rounding():
    found = sinkhorn_plan(random_cost(8, 8), epsilon=1.0, max_iterations=1000)
    assert found.iterations < 1000
    assert found.residual < 1e-14


@pytest.mark.parametrize(
    ("given_type", "solved_type"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_the_solution_stays_in_torch(monkeypatch, given_type, solved_type):
    def refuse(*_args, **_kwargs):
        raise AssertionError("copied to numpy")

    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    monkeypatch.setattr(torch.Tensor, "__array__", refuse)
    cost = (4 * random_cost(3, 5)).to(given_type)
    found = sinkhorn_plan(cost, epsilon=0.5, max_iterations=100, column_weights=torch.tensor([1.0, 2, 0, 1, 1]))
    assert found.plan.dtype == solved_type
    assert found.residual < 1e-6


def test_no_gradient_reaches_the_cost():
    cost = random_cost(3, 3).requires_grad_()
    assert not sinkhorn_plan(cost, epsilon=0.1, max_iterations=5).plan.requires_grad


def test_permuted_rows_and_columns_permute_the_plan():
    cost, a, b = random_cost(5, 7), random_weights(5, 1), random_weights(7, 2)
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([6, 2, 0, 5, 1, 4, 3])
    plan = sinkhorn_plan(cost, epsilon=0.1, max_iterations=200, row_weights=a, column_weights=b).plan
    permuted = sinkhorn_plan(
        cost[rows][:, columns], epsilon=0.1, max_iterations=200, row_weights=a[rows], column_weights=b[columns]
    ).plan
    torch.testing.assert_close(permuted, plan[rows][:, columns], rtol=0, atol=1e-14)


def test_offsets_of_whole_rows_and_columns_leave_the_plan_alone():
    cost = random_cost(5, 7)
    shifted = cost + random_weights(5, 3)[:, None] - 2 * random_weights(7, 4)
    plan = sinkhorn_plan(cost, epsilon=0.1, max_iterations=500).plan
    torch.testing.assert_close(
        sinkhorn_plan(shifted, epsilon=0.1, max_iterations=500).plan, plan, rtol=0, atol=1e-12
    )


def test_costs_far_beyond_the_range_of_exp_are_solved():
    found = sinkhorn_plan(torch.tensor([[0.0, 1e4], [1e4, 0.0]]), epsilon=0.1, max_iterations=50)
    torch.testing.assert_close(found.plan, torch.eye(2) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": torch.zeros(3)}, r"'cost' must be a matrix .* not of shape \(3,\)"),
        ({"cost": torch.zeros(0, 3)}, r"'cost' must be a matrix .* not of shape \(0, 3\)"),
        ({"cost": torch.tensor([[0.0, math.nan]])}, "'cost' has 1 of 2 entries that are not finite"),
        ({"cost": torch.tensor([[0.0, 1e38]]), "epsilon": 1e-3}, "'cost_over_epsilon' has 1 of 2 entries"),
        ({"epsilon": 0.0}, "epsilon must be greater than 0, not 0.0"),
        ({"epsilon": math.nan}, "epsilon must be greater than 0, not nan"),
        ({"max_iterations": 0}, "max_iterations must be greater than 0, not 0"),
        ({"row_weights": torch.ones(3)}, r"'row_weights' must have shape \(2,\), not \(3,\)"),
        ({"column_weights": torch.tensor([1.0, -1, 1])}, "'column_weights' has 1 negative entries"),
        ({"column_weights": torch.zeros(3)}, "'column_weights' are all 0"),
        ({"row_weights": torch.tensor([1.0, math.inf])}, "'row_weights' has 1 of 2 entries that are not"),
    ],
)
def test_what_has_no_plan_is_refused(change, message):
    arguments = {"cost": torch.zeros(2, 3), "epsilon": 0.1, "max_iterations": 10}
    with pytest.raises(ValueError, match=message):
        sinkhorn_plan(**(arguments | change))


@pytest.mark.parametrize(("rows", "columns", "mass"), [(1, 1, 0.5), (6, 6, 0.8), (4, 9, 0.3), (8, 3, 0.95)])
def test_a_partial_plan_is_that_of_pot(rows, columns, mass):
    cost, a, b = random_cost(rows, columns), random_weights(rows, 1), random_weights(columns, 2)
    found = partial_plan(cost, mass=mass, epsilon=0.1, max_iterations=5000, row_weights=a, column_weights=b)
    marginals = (a / a.sum()).numpy(), (b / b.sum()).numpy()
    expected = ot.partial.entropic_partial_wasserstein(
        *marginals, cost.numpy(), 0.1, m=mass, numItermax=50_000, stopThr=1e-15
    )
    torch.testing.assert_close(found.plan, torch.from_numpy(np.asarray(expected)), rtol=0, atol=1e-9)
    assert found.converged and float(found.plan.sum()) == pytest.approx(mass)


def test_a_partial_plan_of_all_mass_is_the_whole_plan():
    cost, a = random_cost(7, 5), random_weights(7, 3)
    partial = partial_plan(cost, mass=1.0, epsilon=0.1, max_iterations=5000, row_weights=a)
    whole = sinkhorn_plan(cost, epsilon=0.1, max_iterations=5000, row_weights=a)
    torch.testing.assert_close(partial.plan, whole.plan, rtol=0, atol=1e-9)


def test_what_is_costly_stays_behind_and_padding_may_hold_anything():
    cost = torch.zeros(5, 5, dtype=torch.float64)
    cost[3] = cost[:, 1] = 4.0
    found = partial_plan(cost, mass=0.6, epsilon=0.05, max_iterations=500)
    assert float(found.plan[3].sum() + found.plan[:, 1].sum()) < 1e-9
    padded = torch.full((6, 7), math.nan, dtype=torch.float64)
    padded[:5, :5] = cost
    rows, columns = torch.ones(6), torch.ones(7)
    rows[5:], columns[5:] = 0, 0
    again = partial_plan(
        padded, mass=0.6, epsilon=0.05, max_iterations=500, row_weights=rows, column_weights=columns
    )
    torch.testing.assert_close(again.plan[:5, :5], found.plan, rtol=0, atol=1e-12)
    assert float(again.plan[5:].abs().sum() + again.plan[:, 5:].abs().sum()) == 0


@pytest.mark.parametrize("mass", [0.0, -0.5, 1.01, math.nan])
def test_a_mass_that_no_plan_has_is_refused(mass):
    with pytest.raises(ValueError, match="mass"):
        partial_plan(random_cost(2, 2), mass=mass, epsilon=0.1, max_iterations=5)


def test_weights_are_the_masses_of_rows_and_columns_of_pots_partial_plan():
    gaps = torch.tensor([2.0, -1.0, 0.3, -3.0, 1.1, 0.0], dtype=torch.float64)
    up, down = gaps / 2, -gaps / 2
    chosen, rejected = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = transport_weights(chosen, rejected, up, down, mass=0.7, max_iterations=5000)
    cosines = torch.nn.functional.normalize(chosen, dim=1) @ torch.nn.functional.normalize(rejected, dim=1).T
    cost = 0.9 * torch.sigmoid(-(up[:, None] - down[None])) + 0.1 * cosines
    uniform = [1 / 6] * 6
    plan = ot.partial.entropic_partial_wasserstein(
        uniform, uniform, cost.numpy(), 0.1, m=0.7, numItermax=50_000, stopThr=1e-15
    )
    expected = 6 * (plan.sum(1) + plan.sum(0)) / 1.4
    torch.testing.assert_close(found.weights, torch.as_tensor(expected), rtol=0, atol=1e-7)
