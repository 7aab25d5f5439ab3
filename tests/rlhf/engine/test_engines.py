import json
from pathlib import Path

import pytest
import torch

from rlhf.engine.deepspeed_ops import ASYNC_IO, find_op

WORKER = str(Path(__file__).parent / "workers" / "train_mlp.py")
NVME = "zero3_nvme"  # needs libaio with its headers
ENGINES = [
    "local",
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero3_hpz",
    pytest.param("zero2_offload", marks=pytest.mark.slow),
    pytest.param(NVME, marks=pytest.mark.slow),
]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def trained():
    return {}


@pytest.fixture
def train(trained, run_ranks, tmp_path_factory):
    """Weights and reports of an engine on some ranks; each is run once."""

    def get(kind: str, ranks: int):
        if kind == NVME and not find_op(ASYNC_IO).usable:
            pytest.skip(f"op {ASYNC_IO}: missing {' and '.join(find_op(ASYNC_IO).missing)}")
        if (kind, ranks) not in trained:
            folder = tmp_path_factory.mktemp(f"{kind}-{ranks}")
            run_ranks([WORKER, kind, str(folder)], ranks, timeout=500)
            reports = json.loads((folder / "reports.json").read_text())
            trained[kind, ranks] = torch.load(folder / "weights.pt"), reports
        return trained[kind, ranks]

    return get


@pytest.mark.parametrize("kind", ENGINES)
def test_two_ranks_under_any_engine_equal_plain_torch_on_one(train, kind):
    expected, expected_reports = train("local", 1)
    weights, reports = train(kind, 2)
    assert sorted(weights["straight"]) == sorted(expected["straight"])
    for name, value in expected["straight"].items():
        torch.testing.assert_close(weights["straight"][name], value, rtol=0, atol=2e-6)
    for found, wanted in zip(reports["straight"], expected_reports["straight"], strict=True):
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert found["learning_rate"] == pytest.approx(wanted["learning_rate"])
    assert any(found["grad_norm"] > 0.5 for found in reports["straight"]), "clipping was not put to the test"


@pytest.mark.parametrize("kind", ENGINES)
def test_save_and_load_continue_bit_for_bit(train, kind):
    weights, reports = train(kind, 2)
    for name, value in weights["straight"].items():
        assert torch.equal(weights["resumed"][name], value), name
    assert reports["resumed"] == reports["straight"][3:]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_loss_that_is_not_finite_drops_the_step_on_all_ranks(train, kind):
    weights, reports = train(kind, 2)
    assert [report["applied"] for report in reports["poisoned"]] == [True, True, False, True, True]
    assert [report["bad_rank"] for report in reports["poisoned"]] == [False, False, True, False, False]
    expected, _ = train("local", 2)
    for name, value in expected["poisoned"].items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(weights["poisoned"][name], value, rtol=0, atol=2e-6)
