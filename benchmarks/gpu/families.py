"""Families of models: which kernel attends to packed rows and how far its gradients are; tokens of recorded forwards.

Each family is a small model with random weights. What it says of packed rows, and its gradients, are compared with
those of length buckets, and the tokens that it writes by CUDA graphs with those that it writes without.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import World, device, has_gpu

SIZES: Mapping[str, Any] = {
    "vocab_size": 340, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 24},
    "qwen3": {**SIZES, "head_dim": 32},
    "gemma2": {**SIZES, "head_dim": 32, "sliding_window": 24, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**SIZES, "head_dim": 32, "sliding_window": 24},
    "gpt2": {
        "vocab_size": 340,
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 1024,
        "initializer_range": 0.1,
    },
    "gpt_oss": {**SIZES, "head_dim": 32, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": SIZES,
}
PRECISIONS = ("float32", "bfloat16")


def cells(world: World) -> list[Cell]:
    chosen = ("llama", "mistral") if world.toy else tuple(FAMILIES)
    return [
        Cell(part="families", name=name, function=f"{__name__}:measure", arguments={"family": name}, seconds=70)
        for name in chosen
    ]


def measure(world: World, *, family: str) -> dict[str, Any]:
    """The kernel by precision, and its largest differences as shares of the largest number; of the sampler, the share
    of responses that are the same with CUDA graphs, and the largest gap of log-probabilities before a token differs.
    """
    import torch

    if has_gpu():
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1  # other families compile beside this one
    return {precision: _measure(family, precision) for precision in PRECISIONS}


def _measure(family: str, precision: str) -> dict[str, Any]:
    import torch

    from policy.model import PolicyModel
    from rlhf.engine.frozen import ReplicatedModel
    from rlhf.engine.ranks import single_rank
    from rlhf.models.packed_attention import kernel_of, set_packing
    from rlhf.train.packing import allow_packing

    ranks = single_rank()
    policy = PolicyModel(_model(family).to(device(), getattr(torch, precision)).eval())
    placed = ReplicatedModel(policy, ranks)
    allow_packing(placed)  # which prints why not
    kernel = kernel_of(policy.hf)
    found: dict[str, Any] = {"kernel": kernel or "buckets"}
    policy.requires_grad_(True)
    if kernel is not None:
        packed = [_said(policy, seed) for seed in (0, 1)]
        set_packing(policy.hf, None)
        apart = [_said(policy, seed) for seed in (0, 1)]
        found["off"] = [max(_off(a[part], b[part]) for a, b in zip(packed, apart, strict=True)) for part in (0, 1)]
    policy.requires_grad_(False)
    return found | _written(policy, ranks)


def _model(family: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf.models.backbones import switch_dropout_off
    from rlhf.models.kernels import exact_attention

    config = AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=exact_attention(config))
    switch_dropout_off(model)
    return model


def _said(policy: Any, seed: int) -> tuple[list[Any], list[Any]]:
    """Log-probabilities of rows, some of which begin alike, and the gradients of their mean."""
    import numpy as np
    import torch

    from rlhf.data.batching import Row, length_bucket, packed_buckets

    generator = np.random.default_rng(seed)
    prompt = generator.integers(3, 330, 60)
    answers = [generator.integers(3, 330, length) for length in generator.integers(20, 200, 6)]
    texts = [np.concatenate([prompt, answer]) for answer in answers[:4]] + answers[4:]
    rows = [Row(text, np.arange(len(text)) > 0) for text in texts]
    buckets = packed_buckets([length_bucket(rows[::2]), length_bucket(rows[1::2])]).to(torch.device(device()))
    policy.zero_grad()
    logprobs = policy(buckets).logprobs
    (sum(each.sum() for each in logprobs) / len(rows)).backward()
    gradients = [parameter.grad.float() for parameter in policy.parameters() if parameter.grad is not None]
    return [each.detach() for each in logprobs], gradients


def _off(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference as a share of the largest number of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(ours, theirs, strict=True))


def _written(policy: Any, ranks: Any) -> dict[str, Any]:
    """Responses by CUDA graphs beside those without."""
    import numpy as np

    from benchmarks.gpu.rollouts import recordings
    from policy.generation.api import row_seed
    from policy.generation.hf import HfSampler
    from policy.generation.options import SamplingConfig
    from rlhf.engine.frozen import ReplicatedModel

    generator = np.random.default_rng(5)
    prompts = [generator.integers(3, 330, length) for length in generator.integers(3, 40, 24)]
    seeds = [row_seed(5, place) for place in range(len(prompts))]
    sides = []
    with recordings() as recorded:
        for graphs in (True, False):
            config = SamplingConfig(max_new_tokens=48, batch_rows=16, cuda_graphs=graphs)
            sampler = HfSampler(ReplicatedModel(policy, ranks), config, eos_token_ids=range(3, 340, 40), pad_token_id=0)
            sides.append(sampler.generate(prompts, seeds))
    same, gap = 0, 0.0
    for one, other in zip(*sides, strict=True):
        shorter = min(len(one.tokens), len(other.tokens))
        differing = np.flatnonzero(one.tokens[:shorter] != other.tokens[:shorter])
        until = int(differing[0]) if len(differing) else shorter
        gap = max(gap, float(np.abs(one.logprobs[:until] - other.logprobs[:until]).max(initial=0.0)))
        same += one.tokens.tolist() == other.tokens.tolist()
    return {"recordings": len(recorded), "same": same / len(prompts), "gap": gap}
