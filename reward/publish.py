"""A reward model on its way to ``final/``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from reward.building import build_reward_model
from reward.config import RewardConfig, RewardModelConfig
from reward.evaluate import Evaluation
from reward.model import RewardModel, Scores
from reward.saving import is_plain, save_reward_model
from reward.serving.vllm_settings import write_vllm_settings
from rlhf.core.errors import ModelError
from rlhf.data.batching import Row
from rlhf.data.templates import ChatFormat
from rlhf.engine.build import DTYPES, precision_of
from rlhf.models.backbones import cut_copy, plain_copy
from rlhf.models.manifest import Manifest, RewardStatistics
from rlhf.models.tokenizer import required_embedding_rows
from rlhf.train.publishing import Weights, text_form
from rlhf.train.roles import is_shared_out


@dataclass(frozen=True, kw_only=True)
class PublishableRewardModel:
    """See :class:`rlhf.train.publishing.Publishable`; the value of a row is its reward."""

    config: RewardConfig
    chat: ChatFormat
    evaluation: Evaluation | None
    """Held-out evaluation of the weights that are published."""
    margins: Mapping[str, float]
    """Telemetry of the margins that the weights were last trained with."""
    training_data: str
    """Fingerprint of the training pairs."""

    reload_module: ClassVar[str] = "reward.reload_check"
    unit: ClassVar[str] = "logits"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[precision_of(self.config.engine)]

    @property
    def details(self) -> dict[str, Any]:
        model = self.config.model
        return {"plain": is_plain(model), "trust_remote_code": model.trust_remote_code}

    @property
    def manifest(self) -> Manifest:
        config = self.config
        return Manifest(
            stage="reward",
            base_model=config.model.path,
            **text_form(self.chat),
            head_kind=config.model.head,
            head_dtype="float32",
            rewards=None if self.evaluation is None else _statistics(self.evaluation),
            margin_statistics=dict(self.margins),
            loss={"loss": config.loss.to_dict(), "margin": config.margin.to_dict()},
            training_data=self.training_data,
        )

    def rehearsed(self, layers: int, folder: Path) -> Self | None:
        cut = cut_copy(self.config.model, layers)
        return None if cut is None else replace(self, config=replace(self.config, model=cut))

    def build(self, dtype: torch.dtype) -> RewardModel:
        return new_model(self.config, self.chat, dtype, copied=True)

    def mapped(self) -> RewardModel:
        return new_model(self.config, self.chat, self.dtype, copied=True, processes=None)

    def tolerance(self, expected: Tensor) -> float:
        """A tenth of the standard deviation of held-out rewards, or of the sample's where none were held out."""
        spread = float(expected.std()) if self.evaluation is None else self.evaluation.reward_sd
        return 0.1 * spread

    def has_value(self, row: Row) -> bool:
        return True

    def value(self, output: Scores, row: Row) -> Tensor:
        return output.rewards[0]

    def save(self, model: RewardModel, folder: Path) -> None:
        save_reward_model(model, folder)

    def saved_alone(self, model: RewardModel) -> None:
        return None

    def save_settings(self, model: RewardModel, folder: Path) -> None:
        save_reward_model(model, folder, weights=False)

    def in_float32(self, saved: RewardModel, weights: Weights) -> RewardModel:
        return saved.float()

    def complete(self, folder: Path) -> None:
        """Write how vLLM is to serve it, where it can."""
        write_vllm_settings(folder, self.chat)


def new_model(
    config: RewardConfig,
    chat: ChatFormat,
    dtype: torch.dtype,
    *,
    checked: bool = True,
    copied: bool = False,
    processes: int | None = 1,
) -> RewardModel:
    """The untrained model of a recipe; with a language-model head where the loss asks for one.

    Args:
        config: the recipe.
        chat: the format of the run.
        dtype: of all weights.
        checked: see :func:`build_reward_model`.
        copied: whether it is a copy to be asked on the CPU, of a model that was checked.
        processes: how many of this host make that copy; ``None``: all ranks, which are going to share it out.
    """
    (role,) = config.models
    assert isinstance(role.backbone, RewardModelConfig)
    if role.backbone.head == "bnrm" and not role.backbone.head_hidden and is_shared_out(role, config.engine):
        raise ModelError(
            "model.head_hidden = 0: the mean of such a head is folded into a linear one when it is published, and "
            f"engine.deepspeed = {config.engine.deepspeed} publishes weights in pieces: take zero2, or local factors"
        )
    return build_reward_model(
        plain_copy(role.backbone) if copied else role.backbone,
        dtype=dtype,
        pad_token_id=chat.tokenizer.pad_token_id,
        vocabulary=required_embedding_rows(chat.tokenizer),
        seed=config.train.seed,
        with_lm_head=role.with_lm_head,
        checked=checked and not copied,
        setting=role.setting,
        processes=processes if copied else None,
        shared=is_shared_out(role, config.engine) and not (copied and processes),
    )


def _statistics(evaluation: Evaluation) -> RewardStatistics:
    return RewardStatistics(
        mean=evaluation.reward_mean,
        standard_deviation=evaluation.reward_sd,
        count=2 * evaluation.accuracy.pairs,
    )
