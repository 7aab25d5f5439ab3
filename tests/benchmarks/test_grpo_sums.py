"""The run that shows GRPO on sums, at a size that proves no more than that it runs."""

import json

import pytest

from benchmarks.grpo_sums import HELD_OUT, run


@pytest.mark.slow
@pytest.mark.full
def test_held_out_sums_are_in_neither_sft_nor_grpo(tmp_path):
    outcome = run(tmp_path, steps=2, epochs=2)
    assert 0 <= outcome.base <= 1 and 0 <= outcome.trained <= 1
    prompts = {
        name: {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("sums", "seldom", "train", "held_out")
    }
    assert len(prompts["held_out"]) == HELD_OUT
    assert prompts["sums"] == prompts["seldom"] == prompts["train"] and not prompts["train"] & prompts["held_out"]
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "rollouts.jsonl").read_text().splitlines()]
    assert all(row["reward"] in (0.0, 1.0) for row in rows)
