"""Tiny policies and samplers in this process, on one rank."""

import numpy as np
import pytest
import torch

from policy.building import build_policy
from policy.generation.api import row_seed
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.model import PolicyModel
from policy.options import PolicyConfig
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.ranks import Ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
LENGTHS = (9, 3, 14, 3, 6, 1, 9, 11)


@pytest.fixture(scope="session")
def alone() -> Ranks:
    return ALONE


@pytest.fixture
def tiny_policy(tiny_model, tiny_tokenizer):
    """``tiny_policy(**model options)``: a new copy of the tiny model."""

    def build(**options) -> PolicyModel:
        config = PolicyConfig(path=str(tiny_model), **options)
        return build_policy(config, dtype=torch.float32, vocabulary=len(tiny_tokenizer), seed=0)

    return build


@pytest.fixture(scope="session")
def prompts() -> list[np.ndarray]:
    """Eight prompts of unequal lengths."""
    generator = np.random.default_rng(0)
    return [generator.integers(3, 300, length) for length in LENGTHS]


@pytest.fixture(scope="session")
def seeds() -> list[int]:
    return [row_seed(7, place) for place in range(len(LENGTHS))]


@pytest.fixture
def make_sampler(tiny_policy):
    """``make_sampler(policy=None, eos=(), tokenizer=None, record=None, **sampling)``."""

    def make(policy: PolicyModel | None = None, eos=(), tokenizer=None, record=None, **sampling) -> HfSampler:
        model = ReplicatedModel(tiny_policy() if policy is None else policy, ALONE)
        options = {"eos_token_ids": eos, "pad_token_id": 2, "tokenizer": tokenizer, "record": record}
        return HfSampler(model, SamplingConfig(**sampling), **options)

    return make
