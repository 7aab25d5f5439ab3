"""Runs of whole stages by their settings, in this process."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.world import World, save_nothing

QUIET = (
    "train.evaluate_every=0",
    "train.checkpoint_every=0",
    "train.publish=none",
    "train.tensorboard=false",
    "optim.schedule=constant",
    "optim.warmup_share=0",
)


def config_of(stage: str, settings: Sequence[str]) -> Any:
    from launch.stages import STAGES
    from rlhf.config import load_config

    return load_config(STAGES[stage].config_class(), [], settings, program="benchmarks.gpu")


def run(stage: str, settings: Sequence[str], ranks: Any) -> list[dict[str, Any]]:
    """What the steps of a run logged."""
    from launch.stages import STAGES

    save_nothing()
    config = config_of(stage, [*settings, *QUIET])
    importlib.import_module(f"{STAGES[stage].module}.stage").run(config, ranks)
    return metrics(Path(config.output))


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "time/step_seconds" in row]


def rows_settings(world: World, name: str, tokens: int) -> list[str]:
    return [f"data.{key}={value}" for key, value in world.settings_of(name, tokens).items()]


def prompts_settings(world: World) -> list[str]:
    """The rows of PPO."""
    return [f"data.train={world.work / 'prompts.jsonl'}", "data.eval_share=0", f"data.cache_dir={world.work / 'cache'}"]
