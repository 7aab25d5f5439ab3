"""Predicted peaks against the resident memory that real runs reach. benchmarks/plan_check.py has many more cases."""

from pathlib import Path

import pytest

from benchmarks import plan_check
from benchmarks.measure import Resident
from rlhf.core.errors import ModelError
from rlhf.models.gguf import embedded_model, import_gguf
from tests.lacking import lacking

pytestmark = [pytest.mark.slow, pytest.mark.dist]
full, param = pytest.mark.full, pytest.param

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 0.15
SLICE = "model.layers=8"
CHECKPOINTING = ("train.micro_batch_tokens=6000", "model.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a folder: the one of the quickstart where it is there, else imported anew."""
    there = ROOT / "models" / "SmolLM2-135M-Instruct"
    if (there / "model.safetensors").is_file():
        return there
    try:
        source = embedded_model()
    except ModelError as error:
        lacking(str(error))
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(source, folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "settings", "ranks"),
    [
        ("reward", (SLICE, "engine.deepspeed=zero2"), 2),
        param("reward", (SLICE, "engine.deepspeed=zero0", "train.micro_batch_tokens=6000"), 1, marks=full),
        param("reward", (SLICE, "engine.deepspeed=zero3"), 2, marks=full),
        param("reward", (SLICE, "engine.deepspeed=zero2", *CHECKPOINTING), 1, marks=full),
        param("sft", ("engine.deepspeed=zero2", "model.freeze_layers=20", "train.global_batch_size=8"), 1, marks=full),
        param(
            "preference",
            (SLICE, "engine.deepspeed=zero2", "model.lora={rank: 16}", "reference.kind=live"),
            1,
            marks=full,
        ),
    ],
)
def test_the_predicted_peak_in_length_buckets_is_within_15_percent_of_the_measured_one(model, stage, settings, ranks):
    check_peak(model, stage, (*settings, 'train.packing="off"'), ranks)


@full
@pytest.mark.parametrize(
    ("stage", "settings"),
    [("reward", (SLICE, "engine.deepspeed=zero2")), ("sft", (SLICE, "engine.kind=local"))],
)
def test_so_is_that_of_packed_rows(model, stage, settings):
    check_peak(model, stage, settings, 1)


def check_peak(model, stage, settings, ranks) -> None:
    found = plan_check.check(plan_check.Case(stage, settings, ranks), model)
    assert found["ratio"] == pytest.approx(1.0, abs=TOLERANCE), found
    assert found["measured"] > 2 * found["items"]["libraries"], "nothing but libraries was measured"


def test_libraries_whose_pages_a_busy_machine_takes_back_count_as_resident():
    """Private bytes and those of files, moment by moment: libraries alone, without them, with a model, without both."""
    moments = iter([(100, 50), (300, 10), (250, 90), (310, 20), (120, 55)])
    found = Resident(lambda: next(moments))
    peaks = []
    for _ in range(4):
        found.look()
        peaks.append(found.peak)
    assert peaks == [350, 350, 360, 360]
