import json
from pathlib import Path

import pytest

from rlhf.engine.deepspeed_config import shipped_names

WORKER = str(Path(__file__).parent / "workers" / "ask_frozen.py")


@pytest.mark.dist
def test_every_shipped_configuration_for_frozen_models_answers_as_a_whole_model_does(run_ranks, tmp_path):
    names = ["replicated", *shipped_names("frozen")]
    run_ranks([WORKER, ",".join(names), str(tmp_path / "answers.json")], 2)
    answers = json.loads((tmp_path / "answers.json").read_text())
    mixed = answers.pop("in float32")
    assert sorted(answers) == sorted(names)
    for name in names:
        for found, expected in zip(answers[name], answers["replicated"], strict=True):
            assert found == pytest.approx(expected, rel=1e-6), name
    # Shares keep the type of the weights, and are computed with in float32, used by their own module or not.
    for found, expected in zip(mixed["shared"], mixed["whole"], strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert mixed["kept"] == ["torch.bfloat16", "torch.float32"] and mixed["last"] == "torch.float32"
    assert mixed["left whole"] == 96 + 64 + 65, "what is small stays whole, as ZeRO-3 has it"
