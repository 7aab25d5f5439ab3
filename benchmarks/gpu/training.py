"""Steps of reward and DPO training, ours and TRL's on the same rows."""

import gc
import importlib.util
import statistics
from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.material import counts_of, rows_file, write_rows
from benchmarks.gpu.peaks import planned_peak
from benchmarks.gpu.world import GIB, Skipped, World, has_gpu, save_nothing

STAGES = ("reward", "dpo")
VARIANTS = {"ours with Liger's kernels": {"kernels": "liger"}, "ours, rows attended one by one": {"attention": "rows"}}
"""What a GPU is asked for beside the defaults: settings of :func:`measure`."""


def cells(world: World) -> list[Cell]:
    """The most important first: 1024 tokens beside TRL, then checkpointing, then the other lengths."""
    first, *rest = world.sizes.tokens
    asked = [(first, rows, False, side) for rows in world.rows for side in ("ours", "trl", *VARIANTS)]
    asked += [(first, rows, True, "ours") for rows in world.rows]
    asked += [(tokens, rows, off, "ours") for tokens in rest for off in (False, True) for rows in world.rows]
    asked += [(first, rows, True, "trl") for rows in world.rows]
    asked += [(tokens, rows, False, "trl") for tokens in rest for rows in world.rows]
    return [
        Cell(
            part="training",
            name=f"{stage}, {rows}, {tokens} tokens{', checkpointing' if checkpointing else ''}, {side}",
            function=f"{__name__}:measure",
            arguments={
                "stage": stage,
                "rows": rows,
                "tokens": tokens,
                "checkpointing": checkpointing,
                "side": "ours" if side in VARIANTS else side,
                **VARIANTS.get(side, {}),
            },
            seconds=20 if side == "trl" else 10,
        )
        for tokens, rows, checkpointing, side in asked
        for stage in STAGES
    ]


def measure(
    world: World, *, stage: str, rows: str, tokens: int, checkpointing: bool, side: str, **more: Any
) -> dict[str, Any]:
    """Pairs a second and useful TFLOP/s of the median timed step, DPO's reference pass counted; losses; peaks."""
    import pair_contender

    if more and not has_gpu():
        raise Skipped("it needs a GPU")
    if "kernels" in more and importlib.util.find_spec("liger_kernel") is None:
        raise Skipped("Liger's kernels are not installed (their wheel is not in the folder)")
    if "attention" in more:
        _attend_row_by_row()
    write_rows(world, rows, tokens)
    sizes = world.sizes
    folder = world.work / "runs" / f"{stage}-{rows}-{tokens}-{checkpointing}-{side}-{'-'.join(map(str, more.values()))}"
    folder.mkdir(parents=True, exist_ok=True)
    data = {name: value for name, value in world.settings_of(rows, tokens).items()}
    pairs, limit = data.pop("train"), data.pop("max_tokens")
    data.pop("eval_share")
    settings = {
        "stage": stage,
        "model": str(world.reward if stage == "reward" else world.policy),
        "folder": str(folder),
        "pairs": pairs,
        "ordered_pairs": str(rows_file(world, rows, tokens, stage)),
        "data": data,
        "order_seed": 0,
        "pairs_per_step": sizes.pairs,
        "max_tokens": limit,
        "learning_rate": 1e-6,
        "beta": 0.1,
        "micro_batch_tokens": sizes.micro_batch_tokens,
        "gradient_checkpointing": checkpointing,
        "engine": {"deepspeed": "zero2"},
        "precompute": False,
        "precision": "bfloat16" if has_gpu() else "float32",
        "liger": has_gpu() and importlib.util.find_spec("liger_kernel") is not None,
        **more,
    }
    if side == "ours":
        measured = pair_contender.Measured()
        save_nothing()
        pair_contender.run_ours(settings, measured)
        _, config, _ = pair_contender.our_run(settings)
        more = planned_peak("preference" if stage == "dpo" else stage, config)
    else:
        measured, more["at_once"] = _largest_batch(settings)
    return _figures(world, measured.numbers, stage, rows, tokens) | more


def _attend_row_by_row() -> None:
    """Have packed rows attend one by one, as on a CPU, and not by FlexAttention."""
    from rlhf.train import packing

    packing.kernels_for = lambda model, device: ("rows",)


def _largest_batch(settings: dict[str, Any]) -> tuple[Any, int]:
    """TRL with as many pairs at once as fit: half of them, until it runs."""
    if importlib.util.find_spec("trl") is None:
        raise Skipped("TRL is not installed (its wheel is not in the folder)")
    import pair_contender
    import torch

    at_once = settings["pairs_per_step"]
    while True:
        measured = pair_contender.Measured()
        try:
            pair_contender.run_trl(settings | {"pairs_at_once": at_once}, measured)
            return measured, at_once
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        at_once //= 2
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _figures(world: World, numbers: dict[str, Any], stage: str, rows: str, tokens: int) -> dict[str, Any]:
    sizes = world.sizes
    timed = numbers["step_seconds"][sizes.warmup :]
    seconds = statistics.median(timed) + numbers["reference_seconds"] / sizes.steps
    counts = counts_of(world, rows, tokens)[sizes.warmup * sizes.pairs :]
    useful = sum(useful_flops(world, stage, **each) for each in counts) / len(timed)
    peak = numbers["peak_device_bytes"] or numbers["peak_rss_bytes"]
    return {
        "pairs_per_second": sizes.pairs / seconds,
        "useful_tflops": useful / seconds / 1e12,
        "step_seconds": timed,
        "reference_seconds": numbers["reference_seconds"],
        "padding": 1 - numbers["needed_tokens"] / numbers["computed_tokens"],
        "computed_tokens": numbers["computed_tokens"] / numbers["tokens"],
        "peak_gib": peak[-1] / GIB,
        "losses": [step["loss"] for step in numbers["steps"]],
    }


def useful_flops(world: World, stage: str, *, prompt: int, answers: int) -> float:
    """Operations that a pair needs: its prompt once, the output projection for answers alone, no attention scores.

    A forward takes 2 for each weight and token, a backward twice that; DPO asks its reference for a forward more.
    """
    shape = world.sizes.model
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layers = shape["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * wide)
    forward = 2.0 * layers * (prompt + answers)
    if stage == "dpo":
        forward += 2.0 * hidden * vocabulary(world) * answers
    return forward * (3 if stage == "reward" else 4)


def vocabulary(world: World) -> int:
    import json

    return json.loads((world.policy / "config.json").read_text())["vocab_size"]
