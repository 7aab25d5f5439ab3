import pytest

from policy.ppo.kl import AdaptiveKl, FixedKl, horizon_of


def test_a_fixed_coefficient_stays():
    kl = FixedKl(0.05)
    kl.update(100.0, 64)
    assert kl.coefficient == 0.05


# The target is 6 nats, the step a tenth of the horizon.
@pytest.mark.parametrize(
    ("measured", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (7.2, 1.02), (60.0, 1.02), (0.0, 0.98), (-1.0, 0.98)],
)
def test_an_adaptive_coefficient_follows_the_error_up_to_a_bound(measured, factor):
    kl = AdaptiveKl(0.2, target=6.0, horizon=10_000)
    kl.update(measured, 1000)
    assert kl.coefficient == pytest.approx(0.2 * factor)


@pytest.mark.parametrize(("steps", "rollouts", "factor"), [(7, 48, 1.2**7), (100, 64, 1.1**100), (500, 8, 1.02**500)])
def test_within_a_run_of_any_length_the_coefficient_can_change_by_much(steps, rollouts, factor):
    """With the 10,000 responses of a fixed horizon, 7 steps of 48 would change it by less than one percent."""
    kl = AdaptiveKl(0.1, target=6.0, horizon=horizon_of(steps, rollouts))
    for _ in range(steps):
        kl.update(60.0, rollouts)
    assert kl.coefficient == pytest.approx(0.1 * factor)
    assert rollouts < 5 * horizon_of(1, rollouts), "one step may not turn it negative"


def test_a_response_to_the_coefficient_is_steered_to_the_target():
    kl = AdaptiveKl(0.01, target=6.0, horizon=2000)
    for _ in range(400):
        kl.update(1.0 / kl.coefficient, 256)
    assert 1.0 / kl.coefficient == pytest.approx(6.0, rel=1e-6)


def test_a_loaded_controller_goes_on_where_the_saved_one_stood():
    steps = (9.0, 2.0, 30.0, 6.1)
    whole, first, second = (AdaptiveKl(0.1, target=6.0, horizon=1000) for _ in range(3))
    for measured in steps:
        whole.update(measured, 128)
    for measured in steps[:2]:
        first.update(measured, 128)
    second.load_state_dict(first.state_dict())
    for measured in steps[2:]:
        second.update(measured, 128)
    assert second.coefficient == whole.coefficient != 0.1


def test_a_fixed_coefficient_is_the_recipe_s_after_loading_too():
    kl = FixedKl(0.3)
    kl.load_state_dict(FixedKl(0.1).state_dict())
    assert kl.coefficient == 0.3


def test_the_state_of_the_other_kind_is_refused():
    fixed, adaptive = FixedKl(0.1), AdaptiveKl(0.1, target=6.0, horizon=1000)
    with pytest.raises(ValueError, match="state of an adaptive KL coefficient"):
        fixed.load_state_dict(adaptive.state_dict())
    with pytest.raises(ValueError, match="state of a fixed KL coefficient"):
        adaptive.load_state_dict(fixed.state_dict())


@pytest.mark.parametrize("measured", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_is_refused(measured):
    with pytest.raises(ValueError, match="kl must be finite"):
        AdaptiveKl(0.1, target=6.0, horizon=1000).update(measured, 10)


def test_a_step_that_would_turn_the_coefficient_negative_is_refused():
    kl = AdaptiveKl(0.1, target=6.0, horizon=100)
    kl.update(0.0, 499)
    assert kl.coefficient > 0
    with pytest.raises(ValueError, match="horizon = 100 must be more than a fifth of a step's 500 responses"):
        kl.update(0.0, 500)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedKl(-0.1), "coefficient must be in"),
        (lambda: AdaptiveKl(0.0, target=6.0, horizon=10), "coefficient must be greater than 0"),
        (lambda: AdaptiveKl(0.1, target=0.0, horizon=10), "target must be greater than 0"),
        (lambda: AdaptiveKl(0.1, target=6.0, horizon=0), "horizon must be greater than 0"),
    ],
)
def test_numbers_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
