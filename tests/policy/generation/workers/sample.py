"""One rank that samples from a tiny policy: python sample.py MODEL ENGINE OUTPUT [LORA].

ENGINE is local, zero2 or zero3. Samples in every way, changes the weights, samples again. Rank 0 of two has one prompt
or none, the other rank all others. The main rank writes what was drawn: for each way, two rounds of all prompts. With
LORA, adapters of that rank are trained: the local engine is then asked with adapters apart, the others as runs do it.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from policy.building import build_policy
from policy.generation.api import row_seed
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.generation.weights import RolloutWeights
from policy.options import PolicyConfig
from rlhf.engine.build import build_engine
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks
from rlhf.models.options import LoraOptions

COUNT = 9


def my_places(first: int, rank: int, ranks: int) -> list[int]:
    """``first``: how many prompts rank 0 of two has."""
    if ranks == 1:
        return list(range(COUNT))
    return list(range(first)) if rank == 0 else list(range(first, COUNT))


def draw(engine, weights, places: list[int], seed: int) -> list[list[int]]:
    """Tokens of the responses to all prompts, on every rank."""
    config = SamplingConfig(max_new_tokens=20, batch_rows=3, temperature=1.3)
    ends = range(0, 321, 15)
    sampler = HfSampler(weights.model, config, eos_token_ids=ends, pad_token_id=2, synced=weights.synced)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 300, 1 + place % 5) for place in range(COUNT)]
    before = digest_of(engine)
    with contextlib.nullcontext() if isinstance(engine, LocalEngine) else weights.fresh():
        responses = sampler.generate([prompts[p] for p in places], [row_seed(seed, p) for p in places])
        inside = digest_of(engine)
    assert digest_of(engine) == before, "sampling changed the weights"
    has_copy = weights.model is not engine
    assert (inside != before) == (merges(engine, has_copy) and seed > 0), "merged only where it should be"
    drawn = {p: response.tokens.tolist() for p, response in zip(places, responses, strict=True)}
    merged = {p: tokens for part in engine.ranks.gather_objects(drawn) for p, tokens in part.items()}
    return [merged[p] for p in range(COUNT)]


def digest_of(engine) -> list[str]:
    """Of the bits of each weight."""
    found = []
    for parameter in engine.module.parameters():
        with engine.whole([parameter]):
            found.append(hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest())
    return found


def merges(engine, has_copy: bool) -> bool:
    """Whether the engine's own weights have adapters in them during a rollout."""
    return engine.module.has_adapters and not has_copy and not isinstance(engine, LocalEngine)


def move_weights(engine) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        with engine.whole([parameter], modify=True), torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def main() -> None:
    model, kind, output, *rank = sys.argv[1:]
    lora = LoraOptions(rank=int(rank[0]), alpha=8.0) if rank else None
    ranks = start_ranks()

    def build():
        return build_policy(PolicyConfig(path=model, lora=lora), dtype=torch.float32, vocabulary=1, seed=0)

    engine = build_engine(
        build(),
        ranks=ranks,
        config=EngineConfig(kind="local") if kind == "local" else EngineConfig(deepspeed=kind, precision="float32"),
        optimizer=OptimizerConfig(),
        total_steps=1,
        hidden_size=32,
    )
    ways = {choice: RolloutWeights(engine, build, choice) for choice in ("once", "never")}
    drawn: dict[str, list] = {}
    for seed in (0, 1):
        for choice, weights in ways.items():
            for first in (0, 1):
                places = my_places(first, ranks.rank, ranks.world_size)
                drawn.setdefault(f"{choice}, {first}", []).append(draw(engine, weights, places, seed))
        move_weights(engine)
    if ranks.is_main:
        Path(output).write_text(json.dumps(drawn))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
