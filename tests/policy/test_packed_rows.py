"""Packed rows train as ordinary ones do, in every stage and under every ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch

WORKER = str(Path(__file__).parent / "workers" / "pack.py")
STAGES = ["zero0", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory, tiny_model, tiny_pairs):
    folder = tmp_path_factory.mktemp("packed")
    pairs = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": each["prompt"], "completion": each["chosen"], "label": place % 3 > 0}) + "\n"
            for place, each in enumerate(pairs)
        )
    )
    run_ranks([WORKER, str(tiny_model), str(tiny_pairs), str(rows), str(folder)], 2)
    return torch.load(folder / "found.pt")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_packed_rows_have_the_loss_and_gradient_of_ordinary_ones_however_they_are_packed(found, stage):
    cases = {name for name, _, _ in found}
    assert len(cases) == 7
    for name in cases:
        loss, gradients = found[name, "local", "ordinary"]
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        assert scale > 1e-3, f"{name}: nothing to compare"
        for way in ("whole", "in parts"):
            packed_loss, packed = found[name, stage, way]
            assert packed_loss == pytest.approx(loss, rel=2e-5), (name, way)
            assert packed.keys() == gradients.keys()
            for label, gradient in gradients.items():
                assert (packed[label] - gradient).abs().max() < 2e-5 * scale, (name, way, label)
