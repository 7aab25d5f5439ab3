"""Our side of ppo_vs_trl.py: the PPO stage itself, as ``python -m policy.ppo`` runs it, with a clock around its steps.

    python benchmarks/ppo_contender.py SETTINGS.json MEASURED.json
"""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from ppo_workload import Measured

from policy.options import PolicyConfig
from policy.ppo.config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PpoConfig,
    RolloutConfig,
    SurrogateConfig,
    WatchConfig,
)
from policy.ppo.reward_options import RewardSourceConfig
from policy.ppo.stage import run
from policy.ppo.task import PpoTask
from rlhf.data.options import PromptDataConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks
from rlhf.models.manifest import Manifest, write_manifest
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig
from rlhf.train.publishing import text_form


def main() -> int:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    measured = Measured(settings)
    run_ours(settings, measured)
    names = ("torch", "transformers", "deepspeed")
    versions = {name: importlib.metadata.version(name) for name in names}
    Path(sys.argv[2]).write_text(json.dumps(measured.report() | {"versions": versions}))
    return 0


def run_ours(settings: dict[str, Any], measured: Measured) -> None:
    watch_steps(measured, settings)
    try:
        run(recipe(settings), start_ranks())
    finally:
        stop_ranks()


def watch_steps(measured: Measured, settings: dict[str, Any]) -> None:
    """Put the clock around ``PpoTask.step``."""
    step = PpoTask.step

    def timed(task: PpoTask, number: int, progress: Any):
        if number == 0:
            measured.begin()
        outcome = step(task, number, progress)
        found, count = outcome.metrics, settings["rows_per_step"]
        measured.rollout([found["tokens_per_response"]] * count, round(found["ended_share"] * count))
        for _ in range(int(found["minibatches"])):
            measured.update()
        measured.score(found["reward"])
        phases = {key: value for key, value in found.items() if key.startswith("time/") and key.endswith("_seconds")}
        measured.phases({key.removeprefix("time/").removesuffix("_seconds"): value for key, value in phases.items()})
        measured.step_done()
        return outcome

    PpoTask.step = timed


def recipe(settings: dict[str, Any]) -> PpoConfig:
    folder, rows = Path(settings["folder"]), settings["rows_per_step"]
    is_ppo = settings["kind"] == "ppo"
    optimizer = OptimizerConfig(
        learning_rate=settings["learning_rate"],
        schedule="constant",
        warmup_share=0,
        weight_decay=settings["weight_decay"],
    )
    return PpoConfig(
        output=folder / "run",
        policy=PolicyConfig(
            path=settings["policy"], gradient_checkpointing=settings.get("gradient_checkpointing", False)
        ),
        reward=RewardSourceConfig(path=str(with_manifest(settings, folder / "reward")), standardize=False, clip=None),
        data=PromptDataConfig(train=settings["prompts"], eval_share=0, cache_dir=folder / "cache"),
        critic=CriticConfig(optim=optimizer, value_clip=settings["value_clip"]),
        rollout=RolloutConfig(
            prompts=rows // settings["samples"],
            samples=settings["samples"],
            max_new_tokens=settings["response_tokens"],
            temperature=settings["temperature"],
            batch_rows=settings.get("batch_rows", 64),
            cuda_graphs=settings.get("cuda_graphs", True),
        ),
        advantage=AdvantageConfig(
            estimator="gae" if is_ppo else "rloo", gamma=settings["gamma"], lam=settings["lam"]
        ),
        kl=KlConfig(coefficient=settings["kl_coefficient"]),
        loss=SurrogateConfig(epochs=settings["epochs"], clip_low=settings["clip"]),
        watch=WatchConfig(action="none"),
        optim=optimizer,
        train=TrainConfig(
            global_batch_size=rows // settings["minibatches"],
            epochs=1000,
            max_steps=settings["warmup_steps"] + settings["steps"],
            micro_batch_tokens=settings.get("micro_batch_tokens", 8192),
            seed=settings["seed"],
            evaluate_every=0,
            checkpoint_every=0,
            publish="none",
        ),
        engine=EngineConfig(deepspeed=settings.get("deepspeed", "zero0")),
    )


def with_manifest(settings: dict[str, Any], folder: Path) -> Path:
    """The reward model as a run of the reward stage would have published it."""
    shutil.copytree(settings["reward"], folder)
    chat = load_chat(settings["policy"])
    manifest = Manifest(
        stage="reward",
        base_model=settings["policy"],
        **text_form(chat),
        head_kind="linear",
        head_dtype="float32",
        rewards=None,
        margin_statistics={},
        loss={},
        training_data="none",
    )
    write_manifest(folder, manifest)
    return folder


if __name__ == "__main__":
    sys.exit(main())
