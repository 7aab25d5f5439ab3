"""One rank that starts models under ZeRO-3: ``start.py FILE``; FILE lists the cases, and gets what was found.

Every case is trained for two steps twice: as DeepSpeed starts a model that every rank has whole in the run's precision,
and as the stages start it. A case with "memory" is started once, and tells the private memory that this took.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.sharded_start import peak_of_private_memory, private_memory
from policy.building import build_policy
from policy.options import PolicyConfig
from reward.building import build_reward_model
from reward.config import RewardModelConfig
from rlhf.data.batching import Row, length_bucket
from rlhf.engine import zero
from rlhf.engine.build import DTYPES, build_engine
from rlhf.engine.frozen import freeze
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import Ranks, start_ranks, stop_ranks
from rlhf.models.options import LoraOptions


def build(case: dict, *, shared: bool):
    dtype, lora = DTYPES[case["precision"]], LoraOptions(rank=4, alpha=8.0) if case["lora"] else None
    sizes = {"dtype": dtype, "vocabulary": 0, "seed": 3, "shared": shared, "checked": False}
    if case["kind"] == "policy":
        return build_policy(PolicyConfig(path=case["path"], lora=lora), **sizes)
    config = RewardModelConfig(path=case["path"], lora=lora, head=case["head"], head_hidden=6, head_init_scale=30.0)
    return build_reward_model(config, pad_token_id=0, with_lm_head=case["lm_head"], **sizes)


def engine_of(case: dict, ranks: Ranks, *, shared: bool):
    model, engine = build(case, shared=shared), EngineConfig(deepspeed="zero3", precision=case["precision"])
    width = model.hf.config.hidden_size
    if case["frozen"]:
        return freeze(model, ranks=ranks, config=engine, placement="zero3", hidden_size=width)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_share=0.0, schedule="constant")
    return build_engine(model, ranks=ranks, config=engine, optimizer=optimizer, total_steps=4, hidden_size=width)


def loss_of(output) -> torch.Tensor:
    if hasattr(output, "rewards"):
        found = output.rewards.square().sum()
        return found if output.logprobs is None else found - 0.01 * output.logprobs.sum()
    return -torch.cat([part.flatten() for part in output.logprobs]).sum() / 100


def trained(case: dict, ranks: Ranks, *, shared: bool):
    """Losses of two steps, and all weights."""
    engine, losses = engine_of(case, ranks, shared=shared), []
    generator = torch.Generator().manual_seed(ranks.rank)
    for _ in range(2):
        tokens = torch.randint(3, 60, (2, 7), generator=generator)
        rows = [Row(row.numpy(), (torch.arange(7) > 2).numpy()) for row in tokens]
        loss = loss_of(engine.forward((length_bucket(rows),)))
        losses.append(float(loss))
        if not case["frozen"]:
            engine.backward(loss, last=True)
            engine.step()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with engine.whole([parameter]):
            weights[name] = parameter.detach().clone()
    return losses, weights | {name: buffer.clone() for name, buffer in engine.module.named_buffers()}


def compared(case: dict, ranks: Ranks) -> dict:
    share_out = zero.share_out
    zero.share_out = lambda *given, **named: None
    expected_losses, expected = trained(case, ranks, shared=False)
    zero.share_out = share_out
    losses, weights = trained(case, ranks, shared=True)
    assert weights.keys() == expected.keys()
    differing = [
        name for name, value in expected.items() if value.dtype != weights[name].dtype or not value.equal(weights[name])
    ]
    return {"losses": losses, "expected": expected_losses, "differing": differing, "weights": len(weights)}


def started(case: dict, ranks: Ranks) -> dict:
    found = {"before": private_memory()}
    with peak_of_private_memory(found, "peak"):
        engine = engine_of(case, ranks, shared=True)
    sizes = [parameter.ds_numel for parameter in engine.module.parameters()]
    return found | {"elements": sum(sizes), "largest": max(sizes)}


def main() -> None:
    ranks, path = start_ranks(), Path(sys.argv[1])
    found = []
    for case in json.loads(path.read_text()):
        found.append(ranks.gather_objects((started if case["memory"] else compared)(case, ranks)))
    ranks.on_main(lambda: path.write_text(json.dumps(found)))
    stop_ranks()


if __name__ == "__main__":
    main()
