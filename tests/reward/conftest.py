"""A reward task in this process: tiny model, plain engine, one rank."""

from dataclasses import replace

import pytest
import torch

from reward.building import build_reward_model
from reward.config import LossConfig, MarginConfig, RewardConfig, RewardModelConfig, WeightConfig
from reward.task import RewardTask
from rlhf.data.options import AS_GIVEN, DataConfig, LabelsConfig
from rlhf.data.preferences import LoadedPreferences, load_preferences
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.tokenizer import load_tokenizer
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig
from rlhf.train.packing import allow_packing

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny_model, tiny_pairs) -> RewardConfig:
    return RewardConfig(
        output=tmp_path_factory.mktemp("runs") / "reward",
        model=RewardModelConfig(path=str(tiny_model), head_init_scale=30.0),
        data=DataConfig(train=str(tiny_pairs), eval_share=0.2, cache_dir=tmp_path_factory.mktemp("cache")),
        margin=MarginConfig(),
        loss=LossConfig(),
        optim=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(global_batch_size=10, micro_batch_tokens=400),
        engine=EngineConfig(kind="local"),
    )


@pytest.fixture(scope="session")
def tiny_data(tiny_config):
    return load_preferences(tiny_config.data, load_chat(tiny_config.model.path, tiny_config.data.template))


@pytest.fixture
def make_task(tiny_config, tiny_data):
    """``make_task(token_budget, loss=..., margin=...)`` gives an engine and a task with fresh weights."""

    def make(
        token_budget: int = 400,
        *,
        loss: LossConfig | None = None,
        margin: MarginConfig | None = None,
        labels: LabelsConfig = AS_GIVEN,
        weights: WeightConfig | None = None,
        data: LoadedPreferences = tiny_data,
        packing: str = "auto",
        ranks: Ranks = ALONE,
        **model,
    ):
        config = replace(
            tiny_config,
            loss=loss or tiny_config.loss,
            margin=margin or tiny_config.margin,
            labels=labels,
            weights=weights or tiny_config.weights,
            model=replace(tiny_config.model, **model),
            train=replace(tiny_config.train, micro_batch_tokens=token_budget, packing=packing),
        )
        tokenizer = load_tokenizer(config.model.path)
        module = build_reward_model(
            config.model,
            dtype=torch.float32,
            pad_token_id=tokenizer.pad_token_id,
            vocabulary=len(tokenizer),
            seed=0,
            with_lm_head=config.loss.kind.startswith("grm"),
        )
        engine = LocalEngine(module, ranks=ranks, optimizer=config.optim, total_steps=20)
        assert allow_packing(engine)
        return engine, RewardTask(engine, config, data.train, data.evals, 20)

    return make
