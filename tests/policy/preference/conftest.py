"""A preference task in this process: tiny model, plain engine, one rank."""

from dataclasses import replace

import pytest
import torch

from policy.building import build_policy
from policy.options import PolicyConfig
from policy.preference.config import LossConfig, PreferenceConfig
from policy.preference.reference import LiveReference
from policy.preference.task import PreferenceTask
from rlhf.data.options import DataConfig
from rlhf.data.preferences import LoadedPreferences, load_preferences
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig
from rlhf.train.packing import allow_packing

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def alone() -> Ranks:
    return ALONE


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny_model, tiny_pairs) -> PreferenceConfig:
    return PreferenceConfig(
        output=tmp_path_factory.mktemp("runs") / "preference",
        model=PolicyConfig(path=str(tiny_model)),
        data=DataConfig(train=str(tiny_pairs), eval_share=0.2, cache_dir=tmp_path_factory.mktemp("cache")),
        loss=LossConfig(kind="sigmoid"),
        optim=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(global_batch_size=10, micro_batch_tokens=400),
        engine=EngineConfig(kind="local"),
    )


@pytest.fixture(scope="session")
def tiny_data(tiny_config):
    return load_preferences(tiny_config.data, load_chat(tiny_config.model.path, tiny_config.data.template))


@pytest.fixture
def tiny_policy(tiny_config, tiny_tokenizer):
    """``tiny_policy(seed=0, noise=0.0, **model options)``: the tiny model, with all weights moved a little by noise."""

    def build(noise: float = 0.0, **options):
        model = build_policy(
            replace(tiny_config.model, **options), dtype=torch.float32, vocabulary=len(tiny_tokenizer), seed=0
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        return model

    return build


@pytest.fixture
def make_task(tiny_config, tiny_data, tiny_policy):
    """``make_task(token_budget, **sections)``: engine and task whose policy is already some way from the reference."""

    def make(token_budget: int = 400, *, noise: float = 0.03, data: LoadedPreferences = tiny_data, **sections):
        train = replace(sections.pop("train", tiny_config.train), micro_batch_tokens=token_budget)
        config = replace(tiny_config, train=train, **sections)
        engine = LocalEngine(tiny_policy(noise), ranks=ALONE, optimizer=config.optim, total_steps=20)
        assert allow_packing(engine)
        reference = None
        if config.loss.needs_reference:
            moves = bool(config.reference.sync_every)
            reference = LiveReference(ReplicatedModel(tiny_policy(), ALONE), moves=moves)
            assert allow_packing(reference.model)
        task = PreferenceTask(engine, config, data.train, data.evals, (reference, reference), 20)
        return engine, task

    return make
