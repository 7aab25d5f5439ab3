"""The critic: the expected return after each token, from a reward model's backbone and head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reward.building import build_reward_model, make_scorer_trainable
from reward.config import RewardModelConfig
from reward.model import RewardModel
from reward.saving import load_reward_model
from rlhf.core.errors import ModelError
from rlhf.core.packing import collect
from rlhf.data.batching import LengthBucket, token_blocks
from rlhf.models.backbones import embedding_rows, switch_dropout_off
from rlhf.models.hidden_states import last_states
from rlhf.models.manifest import MANIFEST_NAME, RewardStatistics, read_manifest
from rlhf.models.options import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class CriticStart:
    """What the critic begins as."""

    backbone: BackboneConfig
    is_reward_model: bool
    statistics: RewardStatistics | None
    """Mean and deviation that bring its first values to the scale of the rewards; ``None`` leaves them."""


class ValueModel(nn.Module):
    """The critic: a value for every response place of rows.

    Args:
        scorer: backbone and head; the head reads every response place instead of the last one.
        mean: subtracted from what the head says,
        deviation: which is then divided by this.
    """

    def __init__(self, scorer: RewardModel, *, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        if not scorer.is_decoder:
            raise ModelError(f"{type(scorer.hf).__name__} reads whole texts: a critic needs a decoder; set critic.path")
        self.scorer = scorer
        self._mean, self._deviation = mean, deviation

    def forward(self, buckets: Sequence[LengthBucket]) -> tuple[Tensor, ...]:
        """``(R, T - 1)`` float32 values of each bucket: place t is the value before token t + 1; 0 off the response."""
        blocks = last_states(self.scorer.hf, *token_blocks(buckets))
        return tuple(self._values(states, bucket) for states, bucket in zip(blocks, buckets, strict=True))

    def _values(self, states: Tensor, bucket: LengthBucket) -> Tensor:
        values = response_values(states, bucket, self.scorer.hf.get_submodule("score"))
        return torch.where(bucket.response_mask[:, 1:], (values - self._mean) / self._deviation, 0.0)


def response_values(states: Tensor, bucket: LengthBucket, head: nn.Module) -> Tensor:
    """``(R, T - 1)`` float32 from ``(R, T, D)`` states: place t is the value before token t + 1; 0 off the response.

    A row without a response keeps the graph alive: under ZeRO-3 every rank must run the same backward pass.
    """
    places, before = bucket.places(), states[:, :-1]
    values = head(collect(before.flatten(0, 1), places)).squeeze(-1).float()
    return values.new_zeros(before.shape[:2].numel()).index_copy(0, places, values).view(before.shape[:2])


def critic_start(backbone: BackboneConfig, *, standardized: bool) -> CriticStart:
    """Where the critic begins: a reward model with its head, or a backbone with a new one.

    Args:
        backbone: of the critic's role.
        standardized: whether rewards are brought to mean 0 and deviation 1.
    """
    folder = Path(backbone.path)
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    if manifest is None or manifest.stage != "reward":
        return CriticStart(backbone=backbone, is_reward_model=False, statistics=None)
    statistics = manifest.rewards if standardized else None
    return CriticStart(backbone=backbone, is_reward_model=True, statistics=statistics)


def build_critic(
    start: CriticStart,
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    vocabulary: int,
    seed: int,
    checked: bool = True,
    setting: str = "critic.path",
    shared: bool = False,
) -> ValueModel:
    """The critic on the CPU, the same on every rank for one seed.

    Args:
        start: where it begins.
        dtype, pad_token_id, vocabulary, seed, checked, setting, shared: see :func:`reward.building.build_reward_model`.
    Raises:
        ModelError: if the model cannot be loaded or does not know the policy's tokens.
    """
    path = start.backbone.path
    options = RewardModelConfig(
        path=path,
        freeze_layers=start.backbone.freeze_layers,
        lora=start.backbone.lora,
        gradient_checkpointing=start.backbone.gradient_checkpointing,
    )
    if not start.is_reward_model:
        scorer = build_reward_model(
            options,
            dtype=dtype,
            pad_token_id=pad_token_id,
            vocabulary=vocabulary,
            seed=seed,
            checked=checked,
            setting=setting,
            shared=shared,
        )
        return ValueModel(scorer)
    torch.manual_seed(seed)
    scorer = load_reward_model(Path(path), dtype=dtype, shared=shared)
    scorer.keep_means()
    known = embedding_rows(scorer.hf)
    if known < vocabulary:
        raise ModelError(f"critic.path = {path} knows {known} tokens, and the policy writes {vocabulary}")
    switch_dropout_off(scorer.hf)
    make_scorer_trainable(scorer, options, dtype)
    if start.statistics is None:
        return ValueModel(scorer)
    return ValueModel(scorer, mean=start.statistics.mean, deviation=start.statistics.standard_deviation)
