"""What a rank takes of its host while a model starts under ZeRO-3: private memory, beside share + largest tensor.

    python benchmarks/sharded_start.py --shape llama-3.2-1b --ranks 4

writes a random model of a known shape, starts so many ranks on this machine, lets each build and share it out as a
stage does with a model of this ``--role``, and compares the peaks with the phase "start" of ``rlhf plan``. Pages of
mapped files do not count: the ranks of a host have them together, and the system takes them back when it needs them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.engine.api import Engine
    from rlhf.engine.frozen import Frozen
    from rlhf.engine.ranks import Ranks

MIB = 2**20
LIMIT = 1.5 * 2**30
"""What a rank may take besides its share and the largest tensor: Python, libraries, the heap."""
ROLES = {"policy": True, "reward": True, "critic": True, "reference": False, "scorer": False}
"""Whether a role is trained. reward: a reward model in its own stage; scorer: one that PPO asks."""


LIVE = ("reference.kind=live", "reference.placement=zero3")
SCORED = ("reward.placement=zero3", "reference.placement=zero3")
"""Settings of the stages that have these roles."""


def private_memory() -> int:
    """Bytes of this process that are no mapped file and not shared."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/self/status: no RssAnon; private memory is measured on Linux only")


@contextmanager
def peak_of_private_memory(found: dict[str, int], name: str) -> Iterator[None]:
    """Note under ``name`` the largest value inside the block, looked at every other millisecond."""
    over, largest = threading.Event(), [private_memory()]

    def watch() -> None:
        while not over.wait(0.002):
            largest.append(max(largest.pop(), private_memory()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found[name] = max(*largest, private_memory())


def add_shape(parser: argparse.ArgumentParser, default: str) -> None:
    """The option ``--shape``: the name of a known shape."""
    from launch.plan.shapes import KNOWN

    known = f"one that rlhf plan knows: {', '.join(KNOWN)} (default %(default)s)"
    parser.add_argument("--shape", default=default, choices=KNOWN, metavar="NAME", help=known)


def write_model(folder: Path, shape: str, dtype: str, **narrowed: int) -> None:
    """A random model of a known shape, but for settings that are ``narrowed``; it is never in memory whole."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from launch.plan.shapes import KNOWN
    from rlhf.models.shards import ShardWriter

    known = dict(KNOWN[shape]) | narrowed
    settings = AutoConfig.for_model(known.pop("model_type"), **known, torch_dtype=dtype)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
    model.config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder) as writer:
        tied = model.all_tied_weights_keys if settings.tie_word_embeddings else {}
        for name, parameter in model.named_parameters():
            if name in tied:
                continue
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            for row in values.view(-1).split(2**24):
                row.copy_(torch.randn(len(row), generator=generator) * 0.02)
            writer.add({name: values + 1 if name.endswith("norm.weight") else values})


def role_of(options: argparse.Namespace, ranks: "Ranks") -> "Engine | Frozen":
    """The model of one role of a run, built and shared out as the stages do it."""
    from policy.building import build_policy
    from policy.ppo.critic import build_critic, critic_start
    from reward.building import build_reward_model
    from reward.config import RewardModelConfig
    from rlhf.engine.build import DTYPES, build_engine, precision_of
    from rlhf.engine.frozen import freeze
    from rlhf.engine.options import EngineConfig, OptimizerConfig
    from rlhf.models.options import BackboneConfig, LoraOptions

    path, engine = str(options.model), EngineConfig(deepspeed="zero3", precision=options.precision)
    lora = LoraOptions(rank=options.lora) if options.lora else None
    sizes = {"dtype": DTYPES[precision_of(engine)], "vocabulary": 0, "seed": 0, "checked": ranks.is_main}
    if options.role in ("policy", "reference"):
        model = build_policy(BackboneConfig(path=path, lora=lora), shared=True, **sizes)
        width = model.hf.config.hidden_size
    elif options.role == "critic":
        start = critic_start(BackboneConfig(path=path, lora=lora), standardized=False)
        model = build_critic(start, pad_token_id=0, shared=True, **sizes)
        width = model.scorer.hf.config.hidden_size
    else:
        model = build_reward_model(RewardModelConfig(path=path, lora=lora), pad_token_id=0, shared=True, **sizes)
        width = model.hf.config.hidden_size
    if ROLES[options.role]:
        optimizer = OptimizerConfig()
        return build_engine(model, ranks=ranks, config=engine, optimizer=optimizer, total_steps=1, hidden_size=width)
    return freeze(model, ranks=ranks, config=engine, placement="zero3", hidden_size=width)


def start(options: argparse.Namespace) -> dict[str, int]:
    """One rank."""
    from rlhf.engine.build import DTYPES
    from rlhf.engine.ranks import start_ranks

    ranks = start_ranks()
    found = {"before": private_memory()}
    with peak_of_private_memory(found, "peak"):
        built = role_of(options, ranks)
    found["after"] = private_memory()
    sizes = [parameter.ds_numel for parameter in built.module.parameters()]
    trained = [parameter.ds_numel for parameter in built.module.parameters() if parameter.requires_grad]
    size = DTYPES[options.precision].itemsize
    # DeepSpeed makes float32 masters and gradients of what is trained before the first step, the moments in it.
    found["share"] = (size * sum(sizes) + 8 * sum(trained)) // ranks.world_size
    found["largest"] = size * max(sizes)
    ranks.barrier()
    return found


def planned(options: argparse.Namespace, ranks: int) -> dict[str, int]:
    """What ``rlhf plan`` has for the start of the role on so many CPU ranks, without libraries."""
    from launch.plan.cluster import cluster_of
    from launch.plan.planner import Request, plan_stage
    from launch.stages import STAGES
    from rlhf.config import load_config

    path, lora = str(options.model), f"{{rank: {options.lora}}}" if options.lora else "null"
    stage, role, settings = {
        "policy": ("sft", "policy", [f"model.path={path}", f"model.lora={lora}"]),
        "reward": ("reward", "reward model", [f"model.path={path}", f"model.lora={lora}"]),
        "reference": ("preference", "reference", [f"model.path={path}", *LIVE]),
        "critic": ("ppo", "critic", [f"policy.path={path}", f"critic.path={path}", f"critic.lora={lora}", *SCORED]),
        "scorer": ("ppo", "reward model", [f"policy.path={path}", f"reward.path={path}", *SCORED]),
    }[options.role]
    if options.role == "scorer":
        settings.append("critic.path=" + path)
    else:
        settings += [f"reward.path={path}"] if stage == "ppo" else []
    settings += ["engine.deepspeed=zero3", f"engine.precision={options.precision}", "data.train=absent.jsonl"]
    config = load_config(STAGES[stage].config_class(), [], [*settings, "output=runs/unused"], program="sharded_start")
    plan = plan_stage(stage, config, cluster_of(device="cpu", devices_per_node=ranks), Request(rows=64, mean_tokens=64))
    phase = next(each for each in plan.phases if each.name == f"{role}: start")
    return {name: size for name, size in phase.host.items() if name.startswith(f"{role}:") or "heap" in name}


def measure(options: argparse.Namespace, ranks: int) -> list[dict[str, int]]:
    """What each of so many ranks has found."""
    from rlhf.core.ports import free_port

    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--as-rank", "--model", str(options.model), "--precision", options.precision]
    command += ["--lora", str(options.lora), "--role", options.role]
    processes = []
    for rank in range(ranks):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(outputs))
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser, "llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--model", type=Path, help="folder of a model; written anew if it is not there")
    parser.add_argument("--stored", default="bfloat16", help="type of the weights in the files that are written")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--role", choices=ROLES, default="policy", help="%(choices)s (default %(default)s)")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights are trained")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    if options.as_rank:
        print(json.dumps(start(options)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.model = options.model or Path(scratch) / "model"
        if not options.model.is_dir():
            narrowed = {} if options.layers is None else {"num_hidden_layers": options.layers}
            write_model(options.model, options.shape, options.stored, **narrowed)
        for count in options.ranks:
            began = time.perf_counter()
            plan = sum(planned(options, count).values())
            for rank, found in enumerate(measure(options, count)):
                rest = found["peak"] - found["share"] - found["largest"]
                print(
                    f"{options.role}, {count} ranks, rank {rank}: share {found['share'] / MIB:.0f} + largest tensor "
                    f"{found['largest'] / MIB:.0f} MiB, private memory {found['before'] / MIB:.0f} MiB before, "
                    f"{found['peak'] / MIB:.0f} at the peak, "
                    f"{found['after'] / MIB:.0f} after: {rest / MIB:.0f} besides (limit {LIMIT / MIB:.0f}); "
                    f"planned {(plan + found['before']) / MIB:.0f} MiB",
                    flush=True,
                )
            print(f"{count} ranks: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
