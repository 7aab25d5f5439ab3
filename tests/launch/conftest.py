"""A tiny reward run for launchers."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory, tiny_model, tiny_pairs) -> tuple[str, ...]:
    """Arguments of a reward run of 12 steps that takes seconds; the output is missing."""
    folder = tmp_path_factory.mktemp("launch")
    path: Path = folder / "tiny.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}, layers: null, freeze_layers: 0, head_init_scale: 10}}\n"
        f"data: {{train: {tiny_pairs}, eval: [], eval_share: 0.2, template: null, cache_dir: {folder}/cache}}\n"
        "margin: {kind: ot, scope: global_batch}\n"
        "optim: {learning_rate: 1e-3, schedule: constant, warmup_share: 0}\n"
        "train: {global_batch_size: 12, micro_batch_tokens: 300, epochs: 2, evaluate_every: 0, checkpoint_every: 0}\n"
        "engine: {deepspeed: zero2}\n"
    )
    return "--config", str(path)
