"""Bytes of states: worked out by hand, and properties that must hold for any size."""

import pytest

from launch.plan.states import Numbers, States, ZeroSettings, frozen_states, trained_states, zero_settings
from rlhf.engine.deepspeed_config import RunValues, resolve

MILLION = 1_000_000
MODEL = Numbers(total=100 * MILLION, trainable=100 * MILLION, largest=MILLION, largest_trainable=MILLION)


def states(name="zero2", *, size=2, ranks=1, micro_batches=1, numbers=MODEL):
    precision = "float32" if size == 4 else "bfloat16"
    values = RunValues(precision=precision, gradient_clipping=1.0, world_size=ranks, hidden_size=1000)
    zero = zero_settings(resolve(name, values))
    return trained_states(zero, numbers, size=size, ranks=ranks, micro_batches=micro_batches, on_cpu=False)


def resting(found: States) -> float:
    """Millions of bytes on the device outside of a step."""
    return (sum(found.device.values()) + sum(found.moments.values())) / MILLION


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("zero0", 1, 100 * (2 + 4 + 8)),
        ("zero0", 4, 100 * (2 + 4 + 8)),
        ("zero1", 4, 100 * (2 + (4 + 8) / 4)),
        ("zero2", 4, 100 * (2 + (4 + 8) / 4)),
        ("zero3", 4, 100 * (2 + 4 + 8) / 4),
        ("zero2_offload", 4, 100 * 2),
        ("zero3_offload", 4, 0),
    ],
)
def test_bfloat16_states_by_hand(name, ranks, expected):
    assert resting(states(name, ranks=ranks)) == expected


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("zero0", 1, 100 * (4 + 8)),
        ("zero1", 2, 100 * (4 + (4 + 8) / 2)),
        ("zero2", 1, 100 * (4 + 4 + 8)),
        ("zero3", 2, 100 * (4 + 4 + 8) / 2),
    ],
)
def test_float32_states_by_hand(name, ranks, expected):
    """Stages 1 to 3 keep a master copy even in float32."""
    assert resting(states(name, size=4, ranks=ranks)) == expected


def test_gradients_by_hand():
    """In bfloat16 stages 2 and 3 add up in float32, where nothing is offloaded; a quarter of 4 times 100 million."""
    assert states("zero1", ranks=4).gradients_after == 200 * MILLION
    assert states("zero2", ranks=4).gradients_after == 100 * MILLION
    accumulating = states("zero2", ranks=4, micro_batches=3)
    assert (accumulating.gradients_before, accumulating.gradients_after) == (100 * MILLION, 100 * MILLION)
    assert states("zero3", ranks=4, micro_batches=3).gradients_after == 100 * MILLION
    assert states("zero3_offload", ranks=4).host["gradients"] == 200 * MILLION
    accumulating = states("zero2", ranks=4, micro_batches=3, size=4)
    assert (accumulating.gradients_before, accumulating.gradients_after) == (100 * MILLION, 200 * MILLION)


def test_offloading_moves_bytes_to_the_host():
    here, away = states("zero2", ranks=2), states("zero2_offload", ranks=2)
    moved = resting(here) - resting(away)
    assert moved == 100 * 12 / 2
    assert (away.host["master weights"] + away.host["optimizer states"]) / MILLION == moved
    assert not here.host


def test_only_what_is_trained_has_gradients_and_moments():
    adapters = Numbers(total=100 * MILLION, trainable=MILLION, largest=MILLION, largest_trainable=1000)
    assert resting(states("zero2", ranks=2, numbers=adapters)) == 100 * 2 + (4 + 8) / 2


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_more_ranks_never_need_more_of_each(name):
    def whole(ranks):
        found = states(name, ranks=ranks)
        return resting(found) + (found.gathered + found.gradients_after) / MILLION, sum(found.host.values())

    sizes = [whole(ranks) for ranks in (2, 4, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_frozen_model_is_whole_or_shared():
    assert frozen_states(None, MODEL, size=2, ranks=8).device == {"weights": 200 * MILLION}
    shared = frozen_states(ZeroSettings(stage=3, max_live=10 * MILLION), MODEL, size=2, ranks=8)
    assert shared.device == {"weights": 25 * MILLION}
    assert shared.gathered == 20 * MILLION
