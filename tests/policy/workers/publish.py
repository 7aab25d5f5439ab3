"""One rank that publishes under ZeRO-3: ``publish.py FILE``; FILE lists the cases, and gets what was found.

Every case is published twice: in pieces, and by the main rank from all weights, as without ZeRO-3.
"""

import json
import sys
from pathlib import Path

import torch

from policy.building import build_policy
from policy.options import PolicyConfig
from policy.publish import PublishablePolicy
from reward.config import RewardConfig, RewardModelConfig
from reward.publish import PublishableRewardModel, new_model
from rlhf.core.errors import ModelError
from rlhf.data.options import DataConfig
from rlhf.data.preferences import load_preferences
from rlhf.engine.build import DTYPES, build_engine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import Ranks, start_ranks, stop_ranks
from rlhf.models import shards
from rlhf.models.options import LoraOptions
from rlhf.models.tokenizer import required_embedding_rows
from rlhf.train import publishing
from rlhf.train.chat import load_chat
from rlhf.train.fresh import end_fresh_process

LITTLE = 30_000
"""Bytes of a file: every case has several."""


def prepared(case: dict, ranks: Ranks):
    """What would be published, and its model."""
    chat, lora = load_chat(case["path"]), LoraOptions(rank=4, alpha=8.0) if case["lora"] else None
    dtype, engine = DTYPES[case["precision"]], EngineConfig(deepspeed="zero3", precision=case["precision"])
    options = DataConfig(train=case["pairs"], cache_dir=Path(case["cache"]))
    data = ranks.main_first(lambda: load_preferences(options, chat)).train
    if case["kind"] == "policy":
        config = PolicyConfig(path=case["path"], lora=lora, publish_lora=case["publish_lora"])
        model = build_policy(
            config, dtype=dtype, vocabulary=required_embedding_rows(chat.tokenizer), seed=0, checked=False, shared=True
        )
        described = {"stage": "preference", "seed": 0, "objective": {}, "training_data": ""}
        return data, model, PublishablePolicy(model=config, dtype=dtype, chat=chat, **described), engine
    config = RewardConfig(
        output=Path(case["cache"]),
        model=RewardModelConfig(path=case["path"], lora=lora, head=case["head"], head_hidden=6, head_init_scale=30.0),
        data=DataConfig(train=case["pairs"]),
        engine=engine,
    )
    described = {"evaluation": None, "margins": {}, "training_data": ""}
    model = new_model(config, chat, dtype, checked=False)
    return data, model, PublishableRewardModel(config=config, chat=chat, **described), engine


def moved_engine(model, config: EngineConfig, ranks: Ranks):
    """An engine whose trained weights are no longer those of any file."""
    width = model.hf.config.hidden_size
    engine = build_engine(
        model, ranks=ranks, config=config, optimizer=OptimizerConfig(), total_steps=1, hidden_size=width
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            with torch.no_grad(), engine.whole([parameter], modify=True):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return engine


def published(case: dict, ranks: Ranks) -> dict:
    data, model, publishable, config = prepared(case, ranks)
    engine, folder = moved_engine(model, config, ranks), Path(case["folder"])
    fits, add = publishing._fits_one_process, shards.ModelWriter.add
    if case["on_all_ranks"]:
        publishing._fits_one_process = lambda size: False
    if case["spoilt"]:
        shards.ModelWriter.add = lambda self, name, value: add(self, name, 1.1 * value)
    try:
        found = {"pieces": publishing.publish(engine, data, publishable, folder / "pieces")}
    except ModelError as error:
        return {"fault": str(error)}
    finally:
        publishing._fits_one_process, shards.ModelWriter.add = fits, add
    engine.shared_out = False
    return found | {"whole": publishing.publish(engine, data, publishable, folder / "whole")}


def main() -> None:
    ranks, path = start_ranks(), Path(sys.argv[1])
    shards.SHARD_BYTES = LITTLE
    found = [ranks.gather_objects(published(case, ranks)) for case in json.loads(path.read_text())]
    ranks.on_main(lambda: path.write_text(json.dumps(found)))
    end_fresh_process()
    stop_ranks()


if __name__ == "__main__":
    main()
