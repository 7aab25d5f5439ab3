"""Loss and gradient norm of the first step of each stage: the same batch on a CPU and on a GPU, in each precision.

Without a GPU, float32 and bfloat16 of the CPU. Responses of PPO are made up from their seeds, so that all sides learn
from the same ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.gpu import stages
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import World, has_gpu

CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
LIMITS = {"float32": 2e-3, "bfloat16": 0.1}
"""Largest difference from the CPU's float32, as a share of it, for gradients: those of bf16 are noisy."""
KEYS = {
    "sft": ("loss", "grad_norm"),
    "reward": ("loss", "grad_norm"),
    "preference": ("logprobs/chosen", "grad_norm"),  # its first loss is log 2 whatever the model says
    "ppo": ("policy/loss", "policy/grad_norm", "critic/loss", "critic/grad_norm"),
}
ROWS, RESPONSE = 8, 24


def cells(world: World) -> list[Cell]:
    """They measure no time, so they run beside each other; the first is what others are compared with."""
    asked = [("cpu float32", "float32", CPU)]
    asked += [("gpu float32", "float32", {}), ("gpu bfloat16", "bfloat16", {})] if has_gpu() else []
    asked += [] if has_gpu() else [("cpu bfloat16", "bfloat16", {})]
    return [
        Cell(
            part="parity",
            name=name,
            function=f"{__name__}:measure",
            arguments={"precision": precision},
            seconds=70,
            environment=environment if has_gpu() else {},
        )
        for name, precision, environment in asked
    ]


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward of PPO: some function of the text."""
    return [(sum(map(ord, response)) % 97) / 97 for response in responses]


def measure(world: World, *, precision: str) -> dict[str, Any]:
    from rlhf.engine.ranks import start_ranks, stop_ranks

    found: dict[str, Any] = {}
    ranks = start_ranks()
    try:
        for stage, keys in KEYS.items():
            output = world.work / "runs" / f"parity-{stage}-{precision}-{ranks.device.type}"
            shared = [f"output={output}", "train.max_steps=1", f"train.global_batch_size={ROWS}"]
            shared += [f"engine.precision={precision}", "train.micro_batch_tokens=2048", "optim.learning_rate=1e-6"]
            (row,) = stages.run(stage, [*shared, *_settings(world, stage)], ranks)
            found |= {f"{stage}: {key}": row[key] for key in keys}
    finally:
        stop_ranks()
    return found


def _settings(world: World, stage: str) -> list[str]:
    if stage == "ppo":
        _make_responses_up()
        settings = [f"policy.path={world.small}", f"reward.function={__name__}:score", "rollout.logprobs=training"]
        settings += [f"rollout.prompts={ROWS}", f"rollout.max_new_tokens={RESPONSE}", "watch.action=none"]
        return [*settings, "loss.epochs=1", *stages.prompts_settings(world)]
    if stage == "sft":
        rows = world.work / "rows" / "conversations.jsonl"
        _write_conversations(world, rows)
        return [f"model.path={world.small}", f"data.train={rows}", "data.eval_share=0", "data.max_tokens=128"]
    name = next(iter(world.rows))
    loss = ["loss.kind=sigmoid"] if stage == "preference" else []
    return [f"model.path={world.small}", *loss, *stages.rows_settings(world, name, world.sizes.tokens[0])]


def _write_conversations(world: World, path: Any) -> None:
    import json

    prompts = (world.work / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    rows = [{"prompt": text, "completion": text[::-1]} for text in (json.loads(line)["prompt"] for line in prompts)]
    part = path.with_suffix(f".{id(rows)}")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


class _MadeUp:
    """A sampler that asks no model."""

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int], advance: Any = None) -> list[Any]:
        from policy.generation.api import Response

        zeros = np.zeros(RESPONSE, np.float32)
        tokens = [np.random.default_rng(seed).integers(10, 300, RESPONSE) for seed in seeds]
        return [Response(tokens=each, logprobs=zeros, entropies=zeros, ended=False) for each in tokens]


def _make_responses_up() -> None:
    from policy.ppo import task

    roll_out = task.roll_out
    task.roll_out = lambda sampler, *rest: roll_out(_MadeUp(), *rest)
