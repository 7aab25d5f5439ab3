"""Steps of RLOO and PPO, ours and TRL's: sampling, scoring, updates."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import GIB, Skipped, World, save_nothing

GENERATION = {"ours": "generate", "launched": "generate", "trl": "generation"}
"""What each side calls the time that sampling takes: ours, ours without CUDA graphs, TRL."""


def cells(world: World) -> list[Cell]:
    asked = [("rloo", "ours"), ("rloo", "trl"), ("ppo", "ours"), ("ppo", "trl")]
    names = {each: ", ".join(each) for each in asked} | {("rloo", "launched"): "rloo, ours without CUDA graphs"}
    older = {"PYTHONPATH": f"{world.trl_ppo}:{':'.join(filter(None, sys.path))}"} if world.trl_ppo else {}
    return [
        Cell(
            part="rollouts",
            name=name,
            function=f"{__name__}:measure",
            arguments={"kind": kind, "side": side},
            seconds=40 if side == "trl" else 30,
            environment=older if (kind, side) == ("ppo", "trl") else {},
        )
        for (kind, side), name in names.items()
    ]


def measure(world: World, *, kind: str, side: str) -> dict[str, Any]:
    """Samples a second of whole steps, tokens a second while sampling, by one ``side`` of :data:`GENERATION`."""
    from ppo_workload import SETTINGS, Measured

    sizes = world.sizes
    folder = world.work / "runs" / f"{kind}-{side}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | {
        "kind": kind,
        "samples": 4 if kind == "rloo" else 1,
        "folder": str(folder),
        "policy": str(world.policy),
        "reward": str(world.reward),
        "prompts": str(world.work / "prompts.jsonl"),
        "response_tokens": sizes.response_tokens,
        "rows_per_step": sizes.responses,
        "minibatches": 2,
        "epochs": 1,
        "warmup_steps": 1,
        "steps": 2 if not world.toy else 1,
        "seed": 0,
        "deepspeed": "zero2",
        "micro_batch_tokens": sizes.micro_batch_tokens,
        "batch_rows": sizes.responses,
        "cuda_graphs": side != "launched",
    }
    measured = Measured(settings)
    if side != "trl":
        import ppo_contender

        save_nothing()
        with recordings() as recorded:
            ppo_contender.run_ours(settings, measured)
    else:
        recorded = []
        _run_trl(kind, settings, measured)
    report = measured.report()
    timed = measured.steps[settings["warmup_steps"] :]
    sampling = report["phase_seconds"][GENERATION[side]] * len(timed)
    drawn = sum(sum(step["response_tokens"]) for step in timed)
    peak = measured.steps[-1].get("peak_device_bytes", measured.steps[-1]["peak_rss_bytes"])
    return {
        "samples_per_second": report["samples_per_second"],
        "rollout_tokens_per_second": drawn / sampling,
        "response_tokens": report["mean_response_tokens"],
        "phase_seconds": report["phase_seconds"],
        "peak_gib": peak / GIB,
        "recordings": len(recorded),
    }


@contextlib.contextmanager
def recordings() -> Iterator[list[Any]]:
    """What is recorded as a CUDA graph inside."""
    from policy.generation import hf

    recorded, record = [], hf.cuda_graph

    def counted(compute: Any) -> Any:
        recorded.append(again := record(compute))
        return again

    hf.cuda_graph = counted
    try:
        yield recorded
    finally:
        hf.cuda_graph = record


def _run_trl(kind: str, settings: dict[str, Any], measured: Any) -> None:
    module = "trl.experimental.ppo" if kind == "ppo" else "trl"
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec(module) is None:
        wanted = "a TRL with PPOTrainer (1.12), given by --trl-ppo" if kind == "ppo" else "TRL"
        raise Skipped(f"needs {wanted}, which is not in the folder")
    import ppo_trl_contender
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(measured.update)
    {"ppo": ppo_trl_contender.run_ppo, "rloo": ppo_trl_contender.run_rloo}[kind](settings, measured)
