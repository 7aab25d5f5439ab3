"""A tiny reward run for launchers, and machines that lack something."""

import os
from pathlib import Path

import pytest

from launch.runs import PipelineStage
from launch.stages import STAGES
from reward.config import RewardConfig
from rlhf.config import load_config


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory, tiny_model, tiny_pairs) -> tuple[str, ...]:
    """Arguments of a reward run of 12 steps that takes seconds; the output is missing."""
    folder = tmp_path_factory.mktemp("launch")
    path: Path = folder / "tiny.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}, layers: null, freeze_layers: 0, head_init_scale: 10}}\n"
        f"data: {{train: {tiny_pairs}, eval: [], eval_share: 0.2, template: null, cache_dir: {folder}/cache}}\n"
        "margin: {kind: ot, parameters: {scope: global_batch}}\n"
        "optim: {learning_rate: 1e-3, schedule: constant, warmup_share: 0}\n"
        "train: {global_batch_size: 12, micro_batch_tokens: 300, epochs: 2, evaluate_every: 0, checkpoint_every: 0}\n"
        "engine: {deepspeed: zero2}\n"
    )
    return "--config", str(path)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """``program(name, script)`` puts a shell script of that name first in PATH."""
    folder = tmp_path / "bin"

    def make(name: str, script: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        if not os.environ["PATH"].startswith(f"{folder}:"):
            monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return make


@pytest.fixture
def no_programs(tmp_path, monkeypatch) -> Path:
    """A machine without a single program in PATH, and without compiled ops."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


@pytest.fixture
def stage(tiny_recipe):
    """``stage(key=value, ...)``: a tiny reward run with its validated recipe."""

    def load(*overrides: str) -> PipelineStage:
        config = load_config(RewardConfig, [Path(tiny_recipe[1])], overrides, program="test")
        return PipelineStage(stage=STAGES["reward"], config=config)

    return load
