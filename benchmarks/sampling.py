"""What the policy's own sampler does in a second: responses of mixed lengths, from a few prompts and from many.

    python benchmarks/sampling.py --model models/SmolLM2-135M-Instruct --layers 8

Each line is one call of the sampler on a CPU: responses a second, CPU seconds, tokens and the forward passes that they
took (what counts on a GPU, where a pass takes the same time for one row as for many), and the operations of a pass that
writes a token (what a GPU would be told to start). Each token ends a response with the chance ``--end-rate``, so that
lengths are geometric, up to ``--new-tokens``. With ``--lora`` the policy has adapters, which are merged as in a run or,
with ``--apart``, are not. The script needs nothing that older versions of the sampler do not have.
"""

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
VIEWS = ("view", "reshape", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand")
VIEWS += ("detach", "alias", "split", "chunk", "unbind", "as_strided", "::t.", "_unsafe_view", "empty")


class CountOperations(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: every operation but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += not any(part in name for part in VIEWS)
        return func(*args, **(kwargs or {}))


def policy_of(options: argparse.Namespace) -> Any:
    """The policy, as an engine that trains holds it."""
    from policy.building import build_policy
    from policy.options import PolicyConfig
    from rlhf.engine.frozen import ReplicatedModel
    from rlhf.engine.ranks import Ranks
    from rlhf.models.options import LoraOptions

    lora = LoraOptions(rank=options.lora) if options.lora else None
    config = PolicyConfig(path=str(options.model), layers=options.layers, lora=lora)
    model = build_policy(config, dtype=getattr(torch, options.precision), vocabulary=0, seed=0, checked=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    return ReplicatedModel(model, ranks)


def ready(model: Any, apart: bool) -> Any:
    """A context in which the model has the weights that a rollout has."""
    from policy.generation.weights import RolloutWeights

    weights = RolloutWeights(model, lambda: model.module)
    if apart or not hasattr(weights, "fresh"):
        return contextlib.nullcontext()
    return weights.fresh()


def measured(options: argparse.Namespace, model: Any, count: int) -> dict[str, float]:
    """One call of the sampler for ``count`` prompts."""
    from policy.generation.api import row_seed
    from policy.generation.hf import HfSampler
    from policy.generation.options import SamplingConfig

    rows = model.module.hf.config.vocab_size
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(4, options.prompt_tokens / 4, count), 4, 4 * options.prompt_tokens).astype(int)
    prompts = [generator.integers(10, rows, length) for length in lengths]
    seeds = [row_seed(1, place) for place in range(count)]
    ends = EndsByChance(options.end_rate)
    config = SamplingConfig(max_new_tokens=options.new_tokens, batch_rows=options.batch_rows)
    sampler = HfSampler(model, config, eos_token_ids=(), pad_token_id=0)
    sampler._stop = ends
    asked: list[int] = []
    hook = model.module.register_forward_pre_hook(lambda *given: asked.append(1))
    with ready(model, options.apart):
        began, cpu_began = time.perf_counter(), time.process_time()
        responses = sampler.generate(prompts, seeds)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        hook.remove()
        counted = CountOperations()
        short = SamplingConfig(max_new_tokens=12, batch_rows=options.batch_rows)
        few = HfSampler(model, short, eos_token_ids=(), pad_token_id=0)
        with counted:
            few.generate(prompts[:4], seeds[:4])
    tokens = sum(len(response.tokens) for response in responses)
    found = {"forwards": len(asked), "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}
    return found | {"operations": counted.count / 12, "checksum": sum(int(r.tokens.sum()) for r in responses)}


class EndsByChance:
    """Ends a response behind a token that says so: the choice depends on the row's own tokens alone."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def ends(self, rows: Any) -> Any:
        last = np.array([row[-1] for row in rows], np.int64)
        places = np.array([len(row) for row in rows], np.int64)
        mixed = (last * 2654435761 + places * 40503) % 1_000_003
        return mixed < self._rate * 1_000_003


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=40, help="on average (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=160, help="at most (default %(default)s)")
    parser.add_argument("--end-rate", type=float, default=0.02, help="chance of an end (default %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=64, help="written together (default %(default)s)")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters (default: none)")
    parser.add_argument("--apart", action="store_true", help="leave adapters apart")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    model = policy_of(options)
    for count in options.prompts:
        found = measured(options, model, count)
        print(
            f"{count} prompts: {count / found['seconds']:.2f} responses/s, {found['cpu_seconds']:.1f} CPU s, "
            f"{found['tokens']} tokens in {found['forwards']} forwards, {found['operations']:.0f} operations a pass, "
            f"checksum {found['checksum']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
