"""What packed rows save: tokens that are computed, and with --steps the seconds of a backbone, forward and backward.

    python benchmarks/packing.py --model models/SmolLM2-135M-Instruct --data PAIRS.jsonl --steps 3 --layers 8

Rows of the global batch as length buckets and packed, in turns (A B A B); the same weights, and the difference of the
gradients is shown. On a CPU, seconds are those of the CPU. On a GPU, packed rows are padded to one of a few lengths, so
that kernels are built once.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.building import build_policy
from rlhf.core.packing import padded_length
from rlhf.data.batching import Batch, ItemSource, token_blocks
from rlhf.data.options import DataConfig
from rlhf.data.preferences import load_preferences
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.ranks import single_rank
from rlhf.models.hidden_states import last_states
from rlhf.models.options import BackboneConfig
from rlhf.models.packed_attention import kernel_of, set_packing
from rlhf.train.batches import BatchMaker
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig
from rlhf.train.packing import allow_packing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--layers", type=int, help="of the model; all, if left out")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a row; longer pairs are left out")
    parser.add_argument("--pairs", type=int, default=64, help="of a global batch")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=0, help="that are timed; 0: tokens are counted only")
    return parser


def count(maker: BatchMaker, loaded: ItemSource, steps: int) -> None:
    """Print what would be computed of all steps of an epoch."""
    real = padded = packed = longer = 0
    lengths = set()
    for step in range(steps):
        for batch in maker.step(loaded, step):
            assert batch.buckets.packing is not None
            tokens = len(batch.buckets.packing.tokens)
            packed, longer = packed + tokens, longer + padded_length(tokens)
            lengths.add(padded_length(tokens))
        real, padded = real + int(maker.tokens), padded + int(maker.padded_tokens)
    print(f"{steps} steps, {real} tokens")
    print(f"length buckets: {1 - real / padded:.1%} of computed tokens are padding")
    print(f"packed: {1 - packed / real:.1%} need not be computed, as another row begins alike: {packed} tokens")
    print(f"on a GPU: {len(lengths)} lengths from {min(lengths)} to {max(lengths)}, {1 - packed / longer:.1%} padding")


def gradients(model: Any, batches: list[Batch]) -> Tensor:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        states = list(last_states(model, *token_blocks(batch.buckets)))
        last = [block[bucket.token_mask].float() for block, bucket in zip(states, batch.buckets, strict=True)]
        sum(each.square().mean() for each in last).backward()  # type: ignore[union-attr]
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def main() -> None:
    options = build_parser().parse_args()
    chat = load_chat(options.model)
    config = DataConfig(train=options.data, eval_share=0.0, max_tokens=options.max_tokens)
    loaded = load_preferences(config, chat).train
    train = TrainConfig(global_batch_size=options.pairs, micro_batch_tokens=options.micro_batch_tokens)
    ranks = single_rank()
    maker = BatchMaker(ranks, train)
    count(maker, loaded, len(loaded) // options.pairs)
    if not options.steps:
        return
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    backbone = BackboneConfig(path=options.model, layers=options.layers)
    policy = build_policy(backbone, dtype=dtype, vocabulary=len(chat.tokenizer), seed=0, checked=False)
    placed, model = ReplicatedModel(policy, ranks), policy.hf
    kernel = kernel_of(model) if allow_packing(placed) else None
    model.requires_grad_(True).train()
    clock = time.perf_counter if ranks.device.type == "cuda" else time.process_time  # CPU seconds, of all threads
    found: dict[str, list[float]] = {"length buckets": [], "packed rows": []}
    for step in range(options.steps):
        batches = maker.step(loaded, step)
        each = {}
        for name, way in (("length buckets", None), ("packed rows", kernel)):
            set_packing(model, way)
            if not step:
                gradients(model, batches)  # warm: memory, kernels
            start = clock()
            each[name] = gradients(model, batches)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(clock() - start)
        apart, together = each.values()
        difference = float((apart - together).abs().max() / apart.abs().max())
        print(f"step {step + 1}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in found.items()))
        print(f"  gradients differ by {difference:.1e} of the largest")
    shares = np.divide(*found.values())
    for name, times in found.items():
        print(f"{name}: {options.pairs / statistics.median(times):.2f} pairs a second")
    print(f"packed rows ({kernel}): {np.median(shares):.2f} x ({shares.min():.2f} to {shares.max():.2f})")


if __name__ == "__main__":
    main()
