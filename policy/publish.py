"""A policy on its way to ``final/``."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from policy.building import build_policy
from policy.model import PolicyModel, PolicyOutput
from policy.options import PolicyConfig
from rlhf.data.batching import Row
from rlhf.data.templates import ChatFormat
from rlhf.engine.build import DTYPES, precision_of
from rlhf.models.backbones import cut_copy, load_causal_lm, plain_copy, save_settings
from rlhf.models.manifest import Manifest
from rlhf.models.tokenizer import required_embedding_rows
from rlhf.train.publishing import Weights, text_form
from rlhf.train.recipe import StageConfig

log = logging.getLogger(__name__)


class PolicyStageConfig(StageConfig, Protocol):
    """The recipe of a stage that trains a policy."""

    @property
    def model(self) -> PolicyConfig: ...


@dataclass(frozen=True, kw_only=True)
class PublishablePolicy:
    """See :class:`rlhf.train.publishing.Publishable`; the value of a row is its mean log-probability."""

    stage: str
    model: PolicyConfig
    dtype: torch.dtype
    seed: int
    chat: ChatFormat
    objective: dict[str, Any]
    """Loss settings, in short."""
    training_data: str
    """Fingerprint of the training rows."""

    reload_module: ClassVar[str] = "policy.reload_check"
    unit: ClassVar[str] = "nats per token"

    @classmethod
    def of(
        cls, config: PolicyStageConfig, chat: ChatFormat, *, stage: str, objective: dict[str, Any], training_data: str
    ) -> "PublishablePolicy":
        """What a stage with the recipe ``config`` publishes."""
        return cls(
            stage=stage,
            model=config.model,
            dtype=DTYPES[precision_of(config.engine)],
            seed=config.train.seed,
            chat=chat,
            objective=objective,
            training_data=training_data,
        )

    @property
    def details(self) -> Mapping[str, Any]:
        return {"ends": list(self.chat.end_token_ids), "trust_remote_code": self.model.trust_remote_code}

    @property
    def manifest(self) -> Manifest:
        return Manifest(
            stage=self.stage,
            base_model=self.model.path,
            **text_form(self.chat),
            head_kind="language model",
            head_dtype=str(self.dtype).removeprefix("torch."),
            rewards=None,
            margin_statistics={},
            loss=self.objective,
            training_data=self.training_data,
        )

    def rehearsed(self, layers: int, folder: Path) -> Self | None:
        cut = cut_copy(self.model, layers)
        if cut is None or not self._is_adapter:
            return None if cut is None else replace(self, model=cut)
        base = load_causal_lm(plain_copy(cut), dtype=self.dtype, vocabulary=1, processes=1)
        base.generation_config = repaired_generation_config(base.generation_config or GenerationConfig())
        base.save_pretrained(folder)
        self.chat.tokenizer.save_pretrained(folder)
        return replace(self, model=replace(cut, path=str(folder), revision=None, layers=None))

    @property
    def _is_adapter(self) -> bool:
        return self.model.lora is not None and self.model.publish_lora == "adapter"

    def build(self, dtype: torch.dtype) -> PolicyModel:
        return self._built(dtype=dtype, processes=1)

    def mapped(self) -> PolicyModel:
        return self._built(dtype=self.dtype, shared=True)

    def _built(self, **options: Any) -> PolicyModel:
        vocabulary = required_embedding_rows(self.chat.tokenizer)
        return build_policy(plain_copy(self.model), vocabulary=vocabulary, seed=self.seed, checked=False, **options)

    def tolerance(self, expected: Tensor) -> float:
        return 0.1

    def has_value(self, row: Row) -> bool:
        return bool(row.response.any())

    def value(self, output: PolicyOutput, row: Row) -> Tensor:
        return output.logprobs[0].sum() / int(row.response[1:].sum())

    def save(self, model: PolicyModel, folder: Path) -> None:
        model.hf.generation_config = _generation_config(model, self.chat)
        model.save(folder, self.model.publish_lora)

    def saved_alone(self, model: PolicyModel) -> list[nn.Parameter] | None:
        if not self._is_adapter:
            return None
        return [each for name, each in model.named_parameters() if "lora_" in name or _is_saved(name, model)]

    def save_settings(self, model: PolicyModel, folder: Path) -> None:
        model.hf.generation_config = _generation_config(model, self.chat)
        save_settings(model.hf, folder)

    def in_float32(self, saved: PolicyModel, weights: Weights) -> PolicyModel:
        if not self._is_adapter:
            return PolicyModel(saved.hf).float()
        model = self.build(torch.float32)  # the base on disk may have more digits than the training had
        kept = {name: value for name, value in weights.items() if "lora_" in name or _is_saved(name, model)}
        model.load_state_dict(kept, strict=False)
        return model.eval()

    def complete(self, folder: Path) -> None:
        return None


def _is_saved(name: str, model: PolicyModel) -> bool:
    """Whether the adapter of a model that was grown is saved with this weight: the embedding, at either end."""
    if not model.grown:
        return False
    ends = (model.hf.get_input_embeddings().weight, model.hf.get_output_embeddings().weight)
    return any(model.get_parameter(name) is weight for weight in ends)


def _generation_config(model: PolicyModel, chat: ChatFormat) -> GenerationConfig:
    """The base model's settings, ending where responses ended in training, and nowhere else."""
    settings = repaired_generation_config(model.hf.generation_config or GenerationConfig())
    settings.eos_token_id = list(chat.end_token_ids)
    settings.pad_token_id = chat.tokenizer.pad_token_id
    return settings


def repaired_generation_config(settings: GenerationConfig) -> GenerationConfig:
    """A copy that Transformers agrees to save, which it does not for settings of sampling where sampling is off.

    A model that came with a temperature was meant to be sampled from. Where that is not all, nothing is kept.
    """
    found = copy.deepcopy(settings)
    complaint = _complaint(found)
    if complaint is None:
        return found
    found.do_sample = True
    if _complaint(found) is None:
        log.warning("generation_config.json of the base model has settings of sampling, but sampling off: switched on")
        return found
    log.warning("generation_config.json of the base model contradicts itself and is left out: %s", complaint)
    return GenerationConfig(bos_token_id=settings.bos_token_id)


def _complaint(settings: GenerationConfig) -> str | None:
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None
