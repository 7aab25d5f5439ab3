"""Runs of whole stages by their settings, in this process."""

import contextlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.world import World, save_nothing

TASKS = {
    "reward": ("reward.stage", "RewardTask"),
    "preference": ("policy.preference.stage", "PreferenceTask"),
    "ppo": ("policy.ppo.stage", "PpoTask"),
}

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


def watch_step(stage: str, number: int, context: Callable[[], contextlib.AbstractContextManager]) -> None:
    """Have the runs of this process do step ``number``, from 0, inside ``context()``: from its rows to its metrics."""
    module, name = TASKS[stage]
    task = getattr(importlib.import_module(module), name)
    if stage == "ppo":
        whole = task.step

        def step(self: Any, at: int, *rest: Any) -> Any:
            with context() if at == number else contextlib.nullcontext():
                return whole(self, at, *rest)

        task.step = step
        return
    begin, end, inside = task.micro_batches, task.step_metrics, contextlib.ExitStack()

    def micro_batches(self: Any, at: int) -> Any:
        if at == number:
            inside.enter_context(context())
        return begin(self, at)

    def step_metrics(self: Any) -> dict[str, float]:
        metrics = end(self)
        inside.close()
        return metrics

    task.micro_batches, task.step_metrics = micro_batches, step_metrics


def run_watched(
    world: World,
    name: str,
    stage: str,
    number: int,
    context: Callable[[], contextlib.AbstractContextManager],
    *more: str,
) -> None:
    """Train a few steps of the reward stage or DPO, step ``number`` inside ``context()``; see :func:`watch_step`.

    The run's folder has a ``name`` that no other measurement has: these are forks of one process, and would go on with
    each other's run.
    """
    from rlhf.engine.ranks import start_ranks, stop_ranks

    watch_step(stage, number, context)
    steps = number + 2
    folder = world.work / "runs" / name
    settings = [f"output={folder}", f"train.max_steps={steps}", f"train.epochs={steps}", *more]
    ranks = start_ranks()
    try:
        run(stage, [*settings, *training_settings(world, stage)], ranks)
    finally:
        stop_ranks()


def training_settings(world: World, stage: str) -> list[str]:
    """A step of the size that is measured, of the reward stage or DPO."""
    sizes = world.sizes
    model = world.reward if stage == "reward" else world.policy
    settings = [f"model.path={model}", f"train.global_batch_size={sizes.pairs}", "optim.learning_rate=1e-6"]
    settings += [f"train.micro_batch_tokens={sizes.micro_batch_tokens}"]
    settings += ["loss.kind=sigmoid"] if stage == "preference" else []
    return [*settings, *rows_settings(world, next(iter(world.rows)), sizes.tokens[0])]


def rows_settings(world: World, name: str, tokens: int) -> list[str]:
    return [f"data.{key}={value}" for key, value in world.settings_of(name, tokens).items()]


def prompts_settings(world: World) -> list[str]:
    """The rows of PPO."""
    return [f"data.train={world.work / 'prompts.jsonl'}", "data.eval_share=0", f"data.cache_dir={world.work / 'cache'}"]
