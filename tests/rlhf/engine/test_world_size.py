"""A checkpoint of two ranks read by one, and of one rank by two, under every engine."""

from pathlib import Path

import pytest
import torch

WORKER = str(Path(__file__).parent / "workers" / "other_ranks.py")
ZERO = ["zero1", "zero2", "zero3"]
LOW_PRECISION = [f"{name}-bfloat16" for name in ZERO]
PLAIN = ["local", "zero0", "zero0-bfloat16"]
OFFLOADED = ["zero2_offload", "zero3_offload"]  # their optimizer is compiled first
WAYS = [(2, 1), (1, 2)]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def runs_by_way():
    return {}


@pytest.fixture
def moved(runs_by_way, run_ranks, tmp_path_factory):
    """``moved(kind, then, now)``: what a run on ``then`` ranks held and became, and what became of it on ``now``."""

    def get(kind: str, then: int, now: int) -> tuple[dict, dict]:
        kinds = tuple(OFFLOADED if kind in OFFLOADED else [*PLAIN, *ZERO, *LOW_PRECISION])
        if (kinds, then) not in runs_by_way:
            folder = runs_by_way[kinds, then] = tmp_path_factory.mktemp("way")
            run_ranks([WORKER, "save", str(folder), *kinds], then, timeout=500)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            said = run_ranks([WORKER, "load", str(folder), *kinds], now, timeout=500)
            left = sorted(path for path in folder.rglob("*") if path.is_file() and f".load{now}" not in path.name)
            assert left == files, "something is left of the conversion"
            converted = [each for each in kinds if each not in PLAIN]
            assert said[0].count(f"{then} ranks then, {now} now") == len(converted)
        folder = runs_by_way[kinds, then]
        return torch.load(folder / f"{kind}.save{then}.pt"), torch.load(folder / f"{kind}.load{now}.pt")

    return get


def compiled(kinds):
    return [pytest.param(kind, marks=[pytest.mark.slow, pytest.mark.full]) for kind in kinds]


@pytest.mark.parametrize(("then", "now"), WAYS)
@pytest.mark.parametrize("kind", [*ZERO, *LOW_PRECISION, *compiled(OFFLOADED)])
def test_weights_moments_and_counters_come_over_bit_for_bit(moved, kind, then, now):
    saved, loaded = (each["held"] for each in moved(kind, then, now))
    assert saved["tensors"].keys() == loaded["tensors"].keys() and len(saved["tensors"]) == 9
    for key, value in saved["tensors"].items():
        assert torch.equal(loaded["tensors"][key], value), key
        assert value.abs().max() > 0, f"{key}: nothing to compare"
    assert len(loaded["parts"]) == now
    for parts in loaded["parts"]:
        assert set(parts["steps"]) == {3.0}
        assert parts["decays"] == saved["parts"][0]["decays"] == [0.1, 0.0]
        assert parts["rates"] == saved["parts"][0]["rates"]


@pytest.mark.parametrize(("then", "now"), WAYS)
@pytest.mark.parametrize("kind", [*PLAIN, *ZERO, *LOW_PRECISION, *compiled(OFFLOADED)])
def test_going_on_with_other_ranks_equals_never_having_stopped(moved, kind, then, now):
    saved, loaded = moved(kind, then, now)
    tolerance = 2e-3 if "bfloat16" in kind else 2e-6
    for name, value in saved["weights"].items():
        torch.testing.assert_close(loaded["weights"][name], value, rtol=0, atol=tolerance)
    for found, expected in zip(loaded["reports"], saved["reports"], strict=True):
        assert found["learning_rate"] == expected["learning_rate"]
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05 if "bfloat16" in kind else 1e-4)
