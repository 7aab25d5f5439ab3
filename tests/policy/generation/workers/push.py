"""One rank that pushes a tiny policy to an engine of vLLM: python push.py MODEL ENGINE LORA_RANK URL TRANSPORT OUTPUT.

The main rank writes what vLLM and the own sampler draw greedily, before and after the weights change.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from policy.building import build_policy
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig, VllmConfig
from policy.generation.vllm.training import VllmTrainingSampler
from policy.generation.weights import RolloutWeights
from policy.options import PolicyConfig
from rlhf.engine.build import build_engine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks
from rlhf.models.options import LoraOptions
from rlhf.train.chat import load_chat

COUNT = 7
TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def main() -> None:
    model, kind, lora_rank, url, transport, output = sys.argv[1:]
    ranks = start_ranks()
    lora = LoraOptions(rank=int(lora_rank)) if int(lora_rank) else None

    def build():
        return build_policy(PolicyConfig(path=model, lora=lora), dtype=torch.float32, vocabulary=1, seed=0)

    engine = build_engine(
        build(),
        ranks=ranks,
        config=EngineConfig(kind="local") if kind == "local" else EngineConfig(deepspeed=kind, precision="float32"),
        optimizer=OptimizerConfig(),
        total_steps=1,
        hidden_size=64,
    )
    chat = load_chat(Path(model), TEMPLATE)
    config = SamplingConfig(
        max_new_tokens=10, top_k=1, backend="vllm", vllm=VllmConfig(urls=(url,), transport=transport)
    )
    sampler = VllmTrainingSampler(engine, chat, config, Path(output).parent / "engine")
    weights = RolloutWeights(engine, build, "never")
    own = HfSampler(
        weights.model, config, eos_token_ids=chat.end_token_ids, pad_token_id=2, synced=weights.synced
    )  # fmt: skip
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 300, 1 + place % 5) for place in range(COUNT)]
    mine = range(COUNT) if ranks.world_size == 1 else (range(2) if ranks.rank == 0 else range(2, COUNT))
    rounds = []
    for _ in range(2):
        both = []
        for each in (sampler, own):
            drawn = each.generate([prompts[place] for place in mine], list(mine))
            parts = ranks.gather_objects({p: r.tokens.tolist() for p, r in zip(mine, drawn, strict=True)})
            merged = {place: tokens for part in parts for place, tokens in part.items()}
            both.append([merged[place] for place in range(COUNT)])
        rounds.append(both)
        noise = torch.Generator().manual_seed(1)
        for parameter in filter(lambda parameter: parameter.requires_grad, engine.module.parameters()):
            with engine.whole([parameter], modify=True), torch.no_grad():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    if ranks.is_main:
        Path(output).write_text(json.dumps({"rounds": rounds, "pushes": sampler.weights.pushes}))
    stop_ranks(together=True)


if __name__ == "__main__":
    main()
