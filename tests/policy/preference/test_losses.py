import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from policy.preference.batch_losses import RUNNING, STATISTICS, gamma_targets, matched
from policy.preference.losses import LENGTHS, LOGPROBS, LOSSES, RATIOS
from rlhf.core.table import parameter_values

WITH_STATISTICS = sorted(name for name, objective in LOSSES.items() if objective.statistics)
ADAPTIVE = ["alpha_dpo", "amapo"]
"""Their margins depend on the pair, but no gradient goes through them: not what finite differences see."""
SMOOTHED = sorted(name for name, objective in LOSSES.items() if "smoothing" in objective.parameters)
GAPS = [{"chosen_logratios": chosen, "rejected_logratios": rejected} for chosen, rejected in [(0, 0), (5, -5)]]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns_of(pairs, seed=1):
    """A column for every input there is: negative log-probabilities, lengths that differ, labels of both kinds."""
    names = (*RATIOS, *LOGPROBS, *LENGTHS, "logratios", "labels", "mismatched_logratios", "data_margins")
    columns = dict(zip(names, randn(len(names), pairs, seed=seed), strict=True))
    for name, column in columns.items():
        if name.endswith("logprobs"):
            columns[name] = -5 * column.abs() - 1
        elif name.endswith("lengths"):
            columns[name] = (4 * column.abs()).round() + 1
        elif name == "labels":
            columns[name] = column > 0
        else:
            columns[name] = 5 * column
    return columns


def inputs_of(name, columns):
    return {key: columns[key] for key in LOSSES[name].inputs}


def statistics_of(name, columns):
    parameters = parameter_values(LOSSES, name, {}, noun="objective")
    return {key: STATISTICS[key](columns, parameters) for key in LOSSES[name].statistics}


def required_of(name, columns):
    """The statistics that the loss cannot compute on its own."""
    return {key: value for key, value in statistics_of(name, columns).items() if key == "kl"}


def learnable(columns):
    """Copies, to be differentiated, of those columns that depend on the policy."""
    names = [key for key in columns if key.endswith(("ratios", "probs"))]
    return {key: columns[key].detach().clone().requires_grad_() for key in names}


def value(name, arguments, **options):
    """The loss of one pair, as a float."""
    columns = {key: torch.tensor([number], dtype=torch.float64) for key, number in arguments.items()}
    return LOSSES[name](**columns, **options).item()


# Values of the small-model report, beta .1, margin 1, delta = smoothing = .1, worked out before the code was written.
@pytest.mark.parametrize(
    ("chosen", "rejected", "hinge_zero", "zero", "softplus", "margin_sigmoid"),
    [
        (0, 0, 2, 1, 2.626523, 0.593147),
        (5, -5, 1, 0.755081, 1.948154, 0.313262),
        (12, -12, 0, 0.462950, 1.196278, 0.238684),
        (-3, 4, 2.7, 1.173130, 3.161426, 0.933186),
        (12, 3, 1.3, 0.805918, 2.139147, 0.331154),
    ],
)
def test_margin_objectives_have_the_values_worked_out_beforehand(
    chosen, rejected, hinge_zero, zero, softplus, margin_sigmoid
):
    pair = {"chosen_logratios": chosen, "rejected_logratios": rejected}
    assert value("apo_hinge_zero", pair) == pytest.approx(hinge_zero, abs=1e-6)
    assert value("apo_zero", pair) == pytest.approx(zero, abs=1e-6)
    assert value("apo_softplus_zero", pair, beta=0.1) == pytest.approx(softplus, abs=1e-6)
    assert value("margin_sigmoid", pair, smoothing=0.1) == pytest.approx(margin_sigmoid, abs=1e-6)


def ratios(chosen, rejected, chosen_length=None, rejected_length=None):
    return _pair("logratios", chosen, rejected, chosen_length, rejected_length)


def probs(chosen, rejected, chosen_length=None, rejected_length=None):
    return _pair("logprobs", chosen, rejected, chosen_length, rejected_length)


def _pair(kind, chosen, rejected, chosen_length, rejected_length):
    values = {
        f"chosen_{kind}": chosen,
        f"rejected_{kind}": rejected,
        "chosen_lengths": chosen_length,
        "rejected_lengths": rejected_length,
    }
    return {key: number for key, number in values.items() if number is not None}


# L(x) = log(1 + exp(-x)): L(1) = .31326169, L(-1) = 1.31326169, L(2) = .12692801, L(0) = log 2, L(log 3) = log(4/3).
LOG2, LOG3, EE = math.log(2), math.log(3), math.e**2


@pytest.mark.parametrize(
    ("name", "pair", "options", "expected"),
    [
        ("sigmoid", ratios(7, -3), {}, 0.31326169),
        ("sigmoid", ratios(7, -3), {"smoothing": 0.1}, 0.41326169),
        ("apo_down", ratios(0, 0), {}, 1),
        ("apo_down", ratios(0, -10 * LOG3), {}, 0.75),
        ("hinge", ratios(4, -3), {}, 0.3),
        ("hinge", ratios(4, -3), {"width": 2.0}, 1.3),
        ("ipo", ratios(10, -3, 5, 3), {}, 4),
        ("ipo_sum", ratios(10, -3), {}, 64),
        ("ipo_sum", ratios(10, -3), {"beta": 0.5}, 144),
        ("exo_pair", ratios(0, 0), {}, 0.5 * math.log(0.25 / (0.999 * 0.001))),
        ("exo_pair", ratios(10 * LOG3, 0), {"smoothing": 0.25}, 0),
        ("nca_pair", ratios(0, 0), {}, 2 * LOG2),
        ("nca_pair", ratios(100, -100), {}, 0.31326169 + (1.31326169 + 0.31326169) / 2),
        ("robust", ratios(7, -3), {}, (0.9 * 0.31326169 - 0.1 * 1.31326169) / 0.8),
        ("bco_pair", ratios(10, -10), {}, 2 * 0.31326169),
        ("bco_pair", ratios(10, -10), {"mean_logratio": 10.0}, LOG2 + 0.12692801),
        ("sppo_hard", ratios(3, -4), {"beta": 0.1}, 5),
        ("discopop", ratios(0, 0), {}, 0.5 * LOG2 + 0.5),
        ("discopop", ratios(LOG3, 0), {"beta": 1.0, "tau": 1.0}, 0.25 * math.log(4 / 3) + 0.25),
        ("sigmoid_norm", ratios(3, 1, 10, 10), {}, 0.31326169),
        ("simpo", probs(-10, -40, 10, 20), {}, 0.31326169),
        ("sft", {"chosen_logprobs": -10, "chosen_lengths": 5}, {}, 2),
        ("cpo", probs(-10, -20, 5), {}, 0.31326169 + 2),
        ("cpo", probs(-10, -20, 5), {"nll_weight": 0.5, "smoothing": 0.1}, 0.41326169 + 1),
        ("orpo", probs(-4 * LOG2, -6 * LOG2, 4, 3), {}, LOG2 + 0.1 * math.log(4 / 3)),
        ("r_dpo", ratios(7, -3, 300, 100), {}, 0.12692801),
        ("r_dpo", ratios(7, -3, 100, 300), {}, LOG2),
        ("amapo", probs(-10, -40, 10, 20), {"mean_gap": 0.5, "gap_deviation": 1.0, "beta": 1.0}, 0.31326169),
        ("amapo", probs(-1, -2, 1, 1), {"mean_gap": 2.0, "gap_deviation": 1.0}, math.log1p(math.exp(2 * EE - 2))),
        (
            "alpha_dpo",
            probs(-10, -30, 10, 20) | ratios(3, 0),
            {"mean_shift": 0.1, "shift_deviation": 0.2},
            LOG2,
        ),
        ("gamma_po", ratios(8, -4), {"targets": torch.tensor([0.3])}, 0.31326169),
        ("gamma_po", ratios(7, -3), {}, 0.31326169),
        ("ot_margin", ratios(7, -3), {}, 0.31326169),
        ("ot_margin", ratios(7, -23), {"margins": torch.tensor([2.0])}, 0.31326169),
    ],
)
def test_values_by_hand(name, pair, options, expected):
    assert value(name, pair, **options) == pytest.approx(expected, abs=2e-8)


def test_kto_by_hand():
    logratios = torch.tensor([10 * LOG3, 10 * LOG3, 20 * LOG3], dtype=torch.float64)
    labels = torch.tensor([True, False, True])
    expected = torch.tensor([0.25, 0.75, 0.1], dtype=torch.float64)
    torch.testing.assert_close(LOSSES["kto"](logratios=logratios, labels=labels, kl=0.0), expected)
    below_zero = LOSSES["kto"](logratios=logratios, labels=labels, kl=torch.tensor(-3.0))
    torch.testing.assert_close(below_zero, expected)
    weighted = LOSSES["kto"](
        logratios=logratios + 7, labels=labels, kl=7.0, desirable_weight=2.0, undesirable_weight=4.0
    )
    torch.testing.assert_close(weighted, expected * torch.tensor([2.0, 4.0, 2.0]))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_objective_is_unreduced_and_refuses_unlike_shapes(name):
    columns = columns_of(5)
    inputs, required = inputs_of(name, columns), required_of(name, columns)
    assert LOSSES[name](**inputs, **required).shape == (5,)
    for key in inputs:
        for wrong in (inputs[key][:, None], inputs[key][:4]):
            with pytest.raises(ValueError, match=rf"'{key}': \({len(wrong)}"):
                LOSSES[name](**inputs | {key: wrong}, **required)
    per_pair = {key: value for key, value in statistics_of(name, columns).items() if value.ndim}
    for key in per_pair:
        with pytest.raises(ValueError, match=rf"'{key}': \(5, 1\)"):
            LOSSES[name](**inputs, **per_pair | {key: per_pair[key][:, None]})


def test_a_column_of_margins_is_refused_not_broadcast():
    with pytest.raises(ValueError, match=r"'margins': \(1, 1\)"):
        value("ot_margin", ratios(0, 0), margins=torch.zeros(1, 1))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_numbers_out_of_range_are_refused(name):
    columns = columns_of(2)
    arguments = inputs_of(name, columns) | required_of(name, columns)
    objective = LOSSES[name]
    wrong = {"beta": (0.0, -1.0, math.nan), "smoothing": (-0.1, 0.5), "tau": (0.0,)}
    not_below_zero = ("width", "margin", "weight", "nll_weight", "desirable_weight", "undesirable_weight")
    wrong |= {key: (-1.0,) for key in not_below_zero}
    for key in wrong.keys() & objective.parameters.keys():
        for number in wrong[key]:
            with pytest.raises(ValueError, match=f"{key} must be .*not {number}"):
                objective(**arguments, **{key: number})


def test_refusals_tell_the_reason():
    with pytest.raises(ValueError, match=r"delta must be in \[0, log 2\), not 0.7: .* no gradient"):
        value("margin_sigmoid", GAPS[0], delta=0.7)
    with pytest.raises(ValueError, match=r"delta must be .* not -0.1"):
        value("margin_sigmoid", GAPS[0], delta=-0.1)
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 0.5\), not 0.5: .* as likely as right ones"):
        value("margin_sigmoid", GAPS[0], smoothing=0.5)
    with pytest.raises(ValueError, match="smoothing must be greater than 0"):
        value("exo_pair", GAPS[0], smoothing=0.0)
    with pytest.raises(ValueError, match="both matched_rejected and matched_chosen, or neither"):
        value("aot_unpaired", GAPS[0], matched_chosen=torch.zeros(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_margin_sigmoid_without_delta_is_cdpo_in_value_and_gradient(smoothing):
    inputs = learnable(inputs_of("sigmoid", columns_of(9)))
    twins = learnable(inputs)
    LOSSES["margin_sigmoid"](**inputs, delta=0.0, smoothing=smoothing).sum().backward()
    LOSSES["sigmoid"](**twins, smoothing=smoothing).sum().backward()
    for key in inputs:
        torch.testing.assert_close(inputs[key].grad, twins[key].grad)


GAPS_IN_NATS = torch.linspace(-60, 60, 241, dtype=torch.float64)


def slopes_of(beta=0.1, delta=0.1, **options):
    """What l+ is at each gap, and the slope of margin_sigmoid there."""
    gaps = GAPS_IN_NATS.clone().requires_grad_(True)
    losses = LOSSES["margin_sigmoid"](
        chosen_logratios=gaps, rejected_logratios=torch.zeros_like(gaps), beta=beta, delta=delta, **options
    )
    losses.sum().backward()
    return -torch.nn.functional.logsigmoid(beta * GAPS_IN_NATS), gaps.grad


@pytest.mark.parametrize("delta", [0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.04, "gate": True}], ids=str)
def test_exactly_the_pairs_below_delta_rest_without_smoothing_or_with_the_gate(delta, options):
    kept, slopes = slopes_of(delta=delta, **options)
    assert torch.equal(slopes == 0, kept < delta)
    assert 20 < int((slopes == 0).sum()) < 120
    assert not bool((slopes > 0).any()), "no pair is pushed the wrong way"


@pytest.mark.parametrize(("delta", "smoothing"), [(0.1, 0.1), (0.3, 0.2), (0.6, 0.01)])
def test_as_printed_no_pair_rests_with_smoothing_and_those_below_delta_are_pushed_back(delta, smoothing):
    kept, slopes = slopes_of(delta=delta, smoothing=smoothing)
    assert not bool((slopes == 0).any())
    assert bool((slopes[kept < delta] > 0).all()), "descent makes their gap smaller"


@pytest.mark.parametrize(
    ("name", "pair", "options", "flat"),
    [
        ("hinge", (6, -6), {}, (True, True)),
        ("hinge", (4, -5), {}, (False, False)),
        ("apo_hinge_zero", (11, -11), {}, (True, True)),
        ("apo_hinge_zero", (11, -9), {}, (True, False)),
        ("apo_hinge_zero", (9, -11), {}, (False, True)),
        ("margin_sigmoid", (15, -10), {"smoothing": 0.0}, (True, True)),
        ("margin_sigmoid", (15, -5), {"smoothing": 0.0}, (False, False)),
    ],
)
def test_gradients_vanish_where_the_margin_is_met_and_only_there(name, pair, options, flat):
    chosen, rejected = (torch.tensor([float(number)], requires_grad=True) for number in pair)
    LOSSES[name](chosen_logratios=chosen, rejected_logratios=rejected, **options).sum().backward()
    assert (chosen.grad.item() == 0, rejected.grad.item() == 0) == flat


@pytest.mark.parametrize("name", sorted({"sigmoid", "cpo", "aot", "aot_unpaired"}))
def test_smoothing_mixes_the_loss_with_that_of_swapped_labels(name):
    columns = columns_of(1)
    inputs = inputs_of(name, columns) | ({} if name != "cpo" else {"nll_weight": 0.0})
    swap = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {}
    for key, column in inputs.items():
        side, _, rest = key.partition("_")
        swapped[f"{swap[side]}_{rest}" if side in swap and "lengths" not in key else key] = column
    mixed = 0.7 * LOSSES[name](**inputs) + 0.3 * LOSSES[name](**swapped)
    torch.testing.assert_close(LOSSES[name](**inputs, smoothing=0.3), mixed)


def test_every_smoothing_changes_the_loss():
    columns = columns_of(6)
    assert set(SMOOTHED) == {"sigmoid", "margin_sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "cpo"}
    for name in SMOOTHED:
        inputs = inputs_of(name, columns)
        one, other = (LOSSES[name](**inputs, smoothing=share) for share in (0.1, 0.2))
        assert bool((one != other).all())


def test_robust_is_unbiased_under_swapped_labels():
    inputs = inputs_of("sigmoid", columns_of(6))
    swapped = {"chosen_logratios": inputs["rejected_logratios"], "rejected_logratios": inputs["chosen_logratios"]}
    expected = 0.8 * LOSSES["robust"](**inputs, smoothing=0.2) + 0.2 * LOSSES["robust"](**swapped, smoothing=0.2)
    torch.testing.assert_close(expected, LOSSES["sigmoid"](**inputs))


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"aot_unpaired", *ADAPTIVE}))
def test_autograd_agrees_with_finite_differences(name):
    columns = columns_of(4, seed=3)
    fixed = inputs_of(name, columns) | statistics_of(name, columns)
    inputs = learnable(inputs_of(name, columns))

    def losses(*values):
        return LOSSES[name](**fixed | dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(losses, tuple(inputs.values()))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_no_gradient_goes_through_an_adaptive_margin(name):
    inputs = inputs_of(name, columns_of(6))
    variables = learnable(inputs)
    losses = LOSSES[name](**inputs | variables)
    losses.sum().backward()
    # With x the argument of -log s, the gradient in x is exp(-loss) - 1, and x has beta / n_w of the log-probability.
    expected = LOSSES[name].parameters["beta"].default * torch.expm1(-losses.detach()) / inputs["chosen_lengths"]
    torch.testing.assert_close(variables["chosen_logprobs"].grad, expected)
    assert all(variables[key].grad is None for key in variables if key.endswith("logratios"))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_extremes_give_finite_losses_and_gradients_in_float32(name, size):
    chosen = size * torch.tensor([1.0, 0.5, 0.1])
    columns = {"chosen_logratios": chosen, "rejected_logratios": -chosen, "logratios": chosen}
    columns |= {"chosen_logprobs": chosen.clamp(max=0), "rejected_logprobs": (-chosen).clamp(max=0)}
    columns |= {"chosen_lengths": torch.full((3,), 7.0), "rejected_lengths": torch.full((3,), 3.0)}
    columns |= {"labels": torch.tensor([True, False, True]), "mismatched_logratios": chosen, "data_margins": chosen}
    inputs = inputs_of(name, columns)
    variables = learnable(inputs)
    losses = LOSSES[name](**inputs | variables, **required_of(name, columns))
    losses.sum().backward()
    gradients = [variable.grad for variable in variables.values() if variable.grad is not None]
    for tensor in (losses, *gradients):
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("name", WITH_STATISTICS)
@pytest.mark.parametrize("sizes", [[4, 4], [5, 1, 2], [1] * 8])
def test_a_batch_cut_into_pieces_has_the_value_and_the_gradient_of_the_whole(name, sizes):
    columns = columns_of(8)
    statistics = statistics_of(name, columns)
    assert all(value.shape in {(), (8,)} and not value.requires_grad for value in statistics.values())
    inputs = inputs_of(name, columns)
    whole, twins = learnable(inputs), learnable(inputs)
    loss = LOSSES[name](**inputs | whole, **required_of(name, columns)).mean()
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(8).split(sizes):
        piece = {key: column[rows] for key, column in (inputs | twins).items()}
        piece |= {key: value[rows] if value.ndim else value for key, value in statistics.items()}
        total = total + LOSSES[name](**piece).sum() / 8
    total.backward()
    torch.testing.assert_close(total, loss)
    for key in whole:
        torch.testing.assert_close(twins[key].grad, whole[key].grad)


@pytest.mark.parametrize("name", sorted({"amapo", "alpha_dpo", "bco_pair", "gamma_po", "aot", "aot_unpaired"}))
def test_statistics_matter_to_every_objective_that_takes_them(name):
    columns, others = columns_of(6), columns_of(6, seed=5)
    inputs = inputs_of(name, columns)
    assert not torch.equal(LOSSES[name](**inputs), LOSSES[name](**inputs, **statistics_of(name, others)))


def test_statistics_by_hand():
    columns = {
        "chosen_logratios": torch.tensor([1.0, 2.0, 9.0]),
        "rejected_logratios": torch.tensor([3.0, -2.0, 5.0]),
        "chosen_logprobs": torch.tensor([-4.0, -6.0, -8.0]),
        "rejected_logprobs": torch.tensor([-6.0, -4.0, -2.0]),
        "chosen_lengths": torch.tensor([1.0, 2.0, 1.0]),
        "rejected_lengths": torch.tensor([1.0, 2.0, 1.0]),
        "mismatched_logratios": torch.tensor([1.0, -4.0, 0.0]),
    }
    parameters = {"beta": 0.5, "gamma": 0.1, "tau": 10.0}
    expected = {
        "mean_logratio": 3.0,
        # Policy gaps 2, -2, -6 rank 3rd, 2nd, 1st; those of the reference are 4, -6, -10.
        "matched_reference": [4.0, -6.0, -10.0],
        "matched_rejected": [-2.0, 3.0, 5.0],
        "matched_chosen": [2.0, 1.0, 9.0],
        "mean_gap": -5 / 3,
        "gap_deviation": math.sqrt((4 + 1 + 36) / 3 - 25 / 9),
        "mean_shift": 4 / 3,
        "shift_deviation": math.sqrt((4 + 4 + 16) / 3 - 16 / 9),
        "targets": gamma_targets(torch.tensor([-1.0, 2.0, 2.0]), gamma=0.1, tau=10.0),
        "kl": -1.0,
    }
    assert expected.keys() == STATISTICS.keys()
    for name, number in expected.items():
        torch.testing.assert_close(STATISTICS[name](columns, parameters), torch.as_tensor(number))


def test_aot_is_the_sum_over_sorted_gaps_in_value_and_gradient():
    inputs = inputs_of("aot", columns_of(7))
    variables, twins = learnable(inputs), learnable(inputs)
    losses = LOSSES["aot"](**variables, beta=0.2, smoothing=0.1)
    policy = twins["chosen_logprobs"] - twins["rejected_logprobs"]
    reference = policy.detach() - (inputs["chosen_logratios"] - inputs["rejected_logratios"])
    x = 0.2 * (policy.sort().values - reference.sort().values)
    expected = (F.softplus(-x) * 0.9 + F.softplus(x) * 0.1).sum()
    torch.testing.assert_close(losses.sum(), expected)
    losses.sum().backward()
    expected.backward()
    for key in ("chosen_logprobs", "rejected_logprobs"):
        torch.testing.assert_close(variables[key].grad, twins[key].grad)
    assert variables["chosen_logratios"].grad is None


def test_unpaired_aot_is_the_sum_over_sorted_logratios_in_value_and_gradient():
    inputs = inputs_of("aot_unpaired", columns_of(7))
    inputs["chosen_logratios"][:3] = 1.5  # ties must be matched one to one, too
    variables, twins = learnable(inputs), learnable(inputs)
    losses = LOSSES["aot_unpaired"](**variables, beta=0.2, smoothing=0.1)
    x = 0.2 * (twins["chosen_logratios"].sort(stable=True).values - twins["rejected_logratios"].sort().values)
    expected = (F.softplus(-x) * 0.9 + F.softplus(x) * 0.1).sum()
    torch.testing.assert_close(losses.sum(), expected)
    losses.sum().backward()
    expected.backward()
    for key in inputs:
        torch.testing.assert_close(variables[key].grad, twins[key].grad)


def test_matched_is_the_cheapest_of_all_assignments():
    values, others = randn(2, 6, seed=4)
    costs = [(values - others[list(order)]).square().sum() for order in itertools.permutations(range(6))]
    torch.testing.assert_close((values - matched(values, others)).square().sum(), torch.stack(costs).min())


def test_equal_values_are_matched_in_their_order():
    values, others = torch.tensor([2.0, 1.0, 2.0, 1.0]), torch.tensor([40.0, 30.0, 20.0, 10.0])
    assert matched(values, others).tolist() == [30, 10, 40, 20]


@pytest.mark.parametrize(("gamma", "tau"), [(0.5, 1.0), (2.0, 0.7), (0.4, 10.0)])
def test_gamma_targets_are_those_of_a_general_solver(gamma, tau):
    gaps = 2 * randn(5, seed=6)

    def objective(p):
        p = torch.from_numpy(p)
        divergence = (p * (len(gaps) * p).log()).sum()
        return (F.softplus(gamma * len(gaps) * p - gaps).mean() + tau * divergence).item()

    simplex = {"type": "eq", "fun": lambda p: p.sum() - 1}
    start, bounds = torch.full((5,), 0.2, dtype=torch.float64).numpy(), [(1e-9, 1.0)] * 5
    solution = minimize(objective, start, bounds=bounds, constraints=simplex, options={"ftol": 1e-15, "maxiter": 1000})
    targets = gamma_targets(gaps, gamma=gamma, tau=tau)
    torch.testing.assert_close(targets, gamma * 5 * torch.from_numpy(solution.x), atol=2e-4, rtol=0)
    torch.testing.assert_close(targets.sum(), torch.tensor(5 * gamma, dtype=torch.float64))
    assert torch.equal(targets.argsort(), gaps.argsort())


def test_adaptive_margins_reduce_to_simpo():
    columns = columns_of(6)
    simpo = inputs_of("simpo", columns)
    plain = LOSSES["simpo"](**simpo, beta=3.0, gamma=1.2)
    torch.testing.assert_close(
        LOSSES["alpha_dpo"](**inputs_of("alpha_dpo", columns), beta=3.0, gamma_ratio=0.4, alpha=0.0), plain
    )
    same = {key: column[:1].repeat(4) for key, column in inputs_of("alpha_dpo", columns).items()}
    for pairs in (1, 4):  # pairs without spread have no adaptive part
        inputs = {key: column[:pairs] for key, column in same.items()}
        simpo = {key: inputs[key] for key in simpo}
        plain = LOSSES["simpo"](**simpo, beta=3.0, gamma=0.6)
        torch.testing.assert_close(LOSSES["alpha_dpo"](**inputs, beta=3.0, gamma_ratio=0.2), plain)
        torch.testing.assert_close(LOSSES["amapo"](**simpo, beta=3.0), LOSSES["simpo"](**simpo, beta=3.0, gamma=0.0))


def test_r_dpo_learns_less_from_chosen_responses_that_are_longer():
    chosen = torch.zeros(3, requires_grad=True)
    lengths = torch.tensor([50.0, 100.0, 200.0])
    LOSSES["r_dpo"](
        chosen_logratios=chosen,
        rejected_logratios=torch.zeros(3),
        chosen_lengths=lengths,
        rejected_lengths=torch.full((3,), 100.0),
    ).sum().backward()
    assert chosen.grad[0] < chosen.grad[1] < chosen.grad[2] < 0


def test_ot_margins_act_as_a_handicap_on_the_chosen_reward():
    inputs, margins = inputs_of("ot_margin", columns_of(5)), randn(5, seed=8).abs()
    handicapped = inputs | {"chosen_logratios": inputs["chosen_logratios"] - margins / 0.1}
    torch.testing.assert_close(LOSSES["ot_margin"](**inputs, margins=margins), LOSSES["sigmoid"](**handicapped))


def test_log_odds_are_exact_for_likely_responses():
    average = -torch.logspace(-6, 0.5, 14, dtype=torch.float64)
    lengths = torch.ones(14, dtype=torch.float64)
    losses = LOSSES["orpo"](
        chosen_logprobs=average,
        rejected_logprobs=torch.full_like(average, -LOG2),
        chosen_lengths=lengths,
        rejected_lengths=lengths,
    )
    probability = average.exp()  # -log s(log odds) of p against one half is -log p
    torch.testing.assert_close(losses, -1.1 * probability.log())


@pytest.mark.parametrize("name", sorted(name for name, objective in LOSSES.items() if objective.takes_margins))
def test_a_margin_is_a_lead_that_the_chosen_response_is_to_have(name):
    columns = columns_of(6)
    inputs, margins = inputs_of(name, columns), randn(6, seed=4).abs()
    objective = LOSSES[name]
    beta = objective.parameters["beta"].default
    plain = objective(**inputs)
    torch.testing.assert_close(objective(**inputs, margins=torch.zeros(6).double()), plain)
    shifted = dict(inputs)
    kind = "logratios" if objective.needs_reference else "logprobs"
    per_unit = columns["chosen_lengths"] if objective.reward == "mean" else torch.ones(6).double()
    if name.startswith("apo"):  # half on each side
        other = columns["rejected_lengths"] if objective.reward == "mean" else torch.ones(6).double()
        shifted[f"rejected_{kind}"] = inputs[f"rejected_{kind}"] + margins / (2 * beta) * other
        shifted[f"chosen_{kind}"] = inputs[f"chosen_{kind}"] - margins / (2 * beta) * per_unit
    elif name == "robust":  # a handicap on whichever response a term prefers
        gap = beta * (inputs["chosen_logratios"] - inputs["rejected_logratios"])
        right, wrong = F.softplus(-(gap - margins)), F.softplus(gap + margins)
        torch.testing.assert_close(objective(**inputs, margins=margins), (0.9 * right - 0.1 * wrong) / 0.8)
        return
    elif name == "cpo":  # whose likelihood has no margin
        shifted["rejected_logprobs"] = inputs["rejected_logprobs"] + margins / beta
    else:
        shifted[f"chosen_{kind}"] = inputs[f"chosen_{kind}"] - margins / beta * per_unit
    torch.testing.assert_close(objective(**inputs, margins=margins), objective(**shifted))
    assert not torch.allclose(plain, objective(**inputs, margins=margins))
    with pytest.raises(ValueError, match="margins"):
        objective(**inputs, margins=margins[:, None])


def test_madpo_weighs_dpo_as_its_authors_code_does():
    margins = torch.linspace(-7, 9, 33).double()
    ratio = randn(33, seed=2)
    losses = LOSSES["madpo"](chosen_logratios=ratio, rejected_logratios=-ratio, data_margins=margins, beta=0.3)
    for margin, d, loss in zip(margins.tolist(), (2 * ratio).tolist(), losses.tolist(), strict=True):
        factor = 0.5 + 1.5 / (1 + 1 / 0.5 * math.exp(abs(margin) - 2))
        weight = (1 + math.exp(-margin)) / (1 + math.exp(-factor * margin)) if margin > -2 else 1.0
        assert loss == pytest.approx(weight * math.log1p(math.exp(-0.3 * d)), rel=1e-9)
    at = {"chosen_logratios": torch.zeros(4).double(), "rejected_logratios": torch.zeros(4).double()}
    weights = LOSSES["madpo"](**at, data_margins=torch.tensor([2.0, 1.0, 30.0, -5.0]).double()) / LOG2
    torch.testing.assert_close(weights[[0, 3]], torch.ones(2).double())  # as it is at the threshold, and contradicted
    assert weights[1] > 1 and weights[2] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="largest"):
        LOSSES["madpo"](**at, data_margins=torch.ones(4).double(), largest=0.9)


def test_the_table_tells_what_each_objective_takes():
    without_reference = {"simpo", "sft", "cpo", "orpo", "amapo"}
    assert {name for name, objective in LOSSES.items() if not objective.needs_reference} == without_reference
    with_margins = {"ot_margin", "sigmoid", "apo_hinge_zero", "apo_softplus_zero", "hinge", "ipo", "ipo_sum", "robust"}
    with_margins |= {"sigmoid_norm", "simpo", "cpo", "r_dpo"}
    assert {name for name, objective in LOSSES.items() if objective.takes_margins} == with_margins
    assert {name for name, objective in LOSSES.items() if objective.unpaired} == {"kto"}
    assert {name for name, objective in LOSSES.items() if "beta" not in objective.parameters} == {"sft", "orpo"}
    averaged = {"ipo", "sigmoid_norm", "simpo", "sft", "orpo", "amapo", "alpha_dpo"}
    assert {name for name, objective in LOSSES.items() if objective.reward == "mean"} == averaged
    reading_lengths = {name for name, objective in LOSSES.items() if set(objective.inputs) & set(LENGTHS)}
    assert reading_lengths == averaged | {"cpo", "r_dpo"}
    assert LOSSES["sft"].inputs == ("chosen_logprobs", "chosen_lengths")
    assert LOSSES["kto"].inputs == ("logratios", "labels")
    assert LOSSES["kto"].statistics == ("kl",)
    defaults = parameter_values(LOSSES, "margin_sigmoid", {}, noun="objective")
    assert defaults == {"beta": 0.1, "delta": 0.1, "smoothing": 0.0, "gate": None}
    taken = {name for objective in LOSSES.values() for name in objective.statistics}
    assert taken == STATISTICS.keys() and taken > RUNNING.keys()


def test_what_an_objective_has_no_place_for_is_refused():
    with pytest.raises(TypeError, match="margins"):
        value("apo_zero", GAPS[0], margins=torch.zeros(1))
    with pytest.raises(TypeError, match="kl"):
        value("kto", {"logratios": 0.0, "labels": 1.0})
