"""Peaks of memory that ``rlhf plan`` predicts, beside what the same runs reach: of a GPU what torch allocated there."""

from typing import Any

from benchmarks.gpu import stages
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import GIB, World, has_gpu

CASES = (
    ("ppo", "zero2", False),
    ("reward", "zero3", True),
    ("preference", "zero3", True),
    ("reward", "zero0", False),
    ("reward", "zero2_offload", False),
    ("ppo", "zero3", True),
    ("reward", "zero1", False),
    ("preference", "zero2_offload", True),
    ("ppo", "zero2_offload", False),
    ("reward", "zero3_offload", True),
)
"""Stage, DeepSpeed configuration, checkpointing, the most important first; training steps are those of ZeRO-2."""
OUTSIDE = ("CUDA context and NCCL", "fragmentation")
"""What a plan counts beside what torch allocates."""
STEPS = 2
"""Two, as Adam's moments lie beside the activations from the second one on."""


def cells(world: World) -> list[Cell]:
    chosen = CASES[:3] if world.toy else CASES
    return [
        Cell(
            part="peaks",
            name=f"{stage}, {placement}{', checkpointing' if checkpointing else ''}",
            function=f"{__name__}:measure",
            arguments={"stage": stage, "placement": placement, "checkpointing": checkpointing},
            seconds=12 if stage == "ppo" or "offload" in placement else 8,
        )
        for stage, placement, checkpointing in chosen
    ]


def measure(world: World, *, stage: str, placement: str, checkpointing: bool) -> dict[str, Any]:
    """GiB at the peak of two steps, planned and measured, and the phase that the plan has it in."""
    import torch

    from rlhf.engine.ranks import start_ranks, stop_ranks
    from rlhf.train.throughput import peak_memory

    name = f"peaks-{stage}-{placement}-{checkpointing}"
    settings = [f"output={world.work / 'runs' / name}", f"engine.deepspeed={placement}", f"train.max_steps={STEPS}"]
    settings += [f"train.micro_batch_tokens={world.sizes.micro_batch_tokens}", "optim.learning_rate=1e-6"]
    section = "policy" if stage == "ppo" else "model"
    settings += [f"{section}.gradient_checkpointing={str(checkpointing).lower()}", *_rows(world, stage)]
    planned = planned_peak(stage, stages.config_of(stage, [*settings, *stages.QUIET]))
    ranks = start_ranks()
    try:
        if has_gpu():
            torch.cuda.reset_peak_memory_stats()
        stages.run(stage, settings, ranks)
        found = peak_memory(ranks.device)
    finally:
        stop_ranks()
    return planned | {"measured_gib": found}


def planned_peak(stage: str, config: Any) -> dict[str, Any]:
    """What ``rlhf plan`` says of the peak of a run on this machine, without what lies outside of torch's memory."""
    from launch.plan.cluster import cluster_of
    from launch.plan.planner import Request, plan_stage

    cluster = cluster_of(devices_per_node=1)
    plan = plan_stage(stage, config, cluster, Request())
    phase = plan.host_peak if cluster.on_cpu else plan.device_peak
    size = phase.host_bytes
    if not cluster.on_cpu:
        size = sum(size for item, size in phase.device.items() if item not in OUTSIDE)
    return {"planned_gib": size / GIB, "phase": phase.name}


def _rows(world: World, stage: str) -> list[str]:
    sizes = world.sizes
    if stage == "ppo":
        rows = [f"policy.path={world.policy}", "reward.function=benchmarks.gpu.parity:score", "watch.action=none"]
        rows += [f"rollout.prompts={sizes.responses}", f"rollout.max_new_tokens={min(64, sizes.response_tokens)}"]
        return [*rows, f"train.global_batch_size={sizes.responses}", *stages.prompts_settings(world)]
    name = next(iter(world.rows))
    rows = [f"model.path={world.reward if stage == 'reward' else world.policy}"]
    rows += [f"train.global_batch_size={sizes.pairs}", *(["loss.kind=sigmoid"] if stage == "preference" else [])]
    return [*rows, *stages.rows_settings(world, name, sizes.tokens[0])]
