"""From a trained policy to ``final/``: saved, reloaded by a fresh process, compared, and only then named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from policy.model import PolicyConfig, PolicyModel, PolicyOutput, build_policy
from rlhf.core.errors import ModelError
from rlhf.core.files import staged_directory
from rlhf.data.batching import ItemSource, Row, length_bucket
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import ChatFormat
from rlhf.engine.api import Engine
from rlhf.engine.build import DTYPES, precision_of
from rlhf.models.manifest import Manifest, write_manifest
from rlhf.models.tokenizer import pad_policy, required_embedding_rows
from rlhf.train.publishing import check_in_fresh_process, check_low_precision, live_outputs, readable_cases, sample_rows
from rlhf.train.stage import StageConfig, say

LOW_PRECISION_TOLERANCE = 0.1
"""How far bfloat16 log-probabilities of training may be from float32 ones of the same weights, in nats per token."""


class PolicyStageConfig(StageConfig, Protocol):
    """The recipe of a stage that trains a policy."""

    @property
    def model(self) -> PolicyConfig: ...


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What goes into ``final/`` besides the weights."""

    stage: str
    model: PolicyConfig
    dtype: torch.dtype
    seed: int
    chat: ChatFormat
    objective: dict[str, Any]
    """Loss settings, in short."""
    training_data: str
    """Fingerprint of the training rows."""

    def manifest(self) -> Manifest:
        tokenizer = self.chat.tokenizer
        return Manifest(
            stage=self.stage,
            base_model=self.model.path,
            template_digest=self.chat.digest,
            tokenizer_digest=self.chat.tokenizer_digest,
            pad_policy=pad_policy(tokenizer),
            vocabulary_size=len(tokenizer),
            head_kind="language model",
            head_dtype=str(self.dtype).removeprefix("torch."),
            rewards=None,
            margin_statistics={},
            loss=self.objective,
            training_data=self.training_data,
        )


def publish_run(
    config: PolicyStageConfig,
    engine: Engine,
    chat: ChatFormat,
    sample: ItemSource,
    *,
    stage: str,
    objective: dict[str, Any],
    training_data: str,
) -> None:
    """Publish what ``engine`` holds as ``final/`` of the run folder, unless the recipe asks for none.

    Args:
        config: the recipe.
        engine: every rank must call this.
        chat: tokenizer and template of the run.
        sample: rows whose log-probabilities the reloaded model must reproduce.
        stage: for the manifest,
        objective: and the settings of the loss, in short,
        training_data: and the fingerprint of what was trained on.
    """
    if config.train.publish == "none":
        return
    publication = Publication(
        stage=stage,
        model=config.model,
        dtype=DTYPES[precision_of(config.engine)],
        seed=config.train.seed,
        chat=chat,
        objective=objective,
        training_data=training_data,
    )
    target = config.output / "final"
    differences = publish(engine, sample, publication, target)
    reloaded = f"reloaded in a fresh process, largest difference {max(differences.values()):.1e} nats per token"
    say(engine.ranks, f"published {target}: {reloaded}")


def publish(engine: Engine, data: ItemSource, publication: Publication, target: Path) -> dict[str, float]:
    """Write ``target`` atomically after a fresh process has reproduced log-probabilities of sample rows.

    Returns:
        The largest difference to the live values in nats per token, by way of padding.
    Raises:
        ModelError: if the saved model disagrees; an earlier ``target`` stays as it was.
    """
    rows = [row for row in sample_rows(data) if row.response.any()]
    live = torch.stack([_per_token(output, row) for output, row in zip(live_outputs(engine, rows), rows, strict=True)])
    weights = engine.full_state_dict()
    return engine.ranks.on_main(lambda: _write(publication, weights, rows, live.float().cpu(), target))


def _write(
    publication: Publication, weights: dict[str, Tensor], rows: list[Row], live: Tensor, target: Path
) -> dict[str, float]:
    tokenizer = portable_tokenizer(publication.chat)
    model = _rebuild(publication, weights)
    with staged_directory(target) as staged:
        model.hf.generation_config = _generation_config(model, publication.chat)
        model.save(staged, publication.model.publish_lora)
        tokenizer.save_pretrained(staged)
        write_manifest(staged, publication.manifest())
        expected = live
        if publication.dtype != torch.float32:
            expected = _float32_values(_as_saved(publication, model, weights), rows)
            check_low_precision(live, expected, LOW_PRECISION_TOLERANCE)
        request = {"rows": readable_cases(rows, expected, tokenizer)}
        return check_in_fresh_process("policy.reload_check", staged, request)


def _rebuild(publication: Publication, weights: dict[str, Tensor]) -> PolicyModel:
    """A copy on the CPU with the trained weights, adapters still apart."""
    model = _untrained(publication, publication.dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {*dict(model.named_parameters())}
    if set(missing) - tied or unexpected:
        raise ModelError(f"trained weights do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


def _untrained(publication: Publication, dtype: torch.dtype) -> PolicyModel:
    vocabulary = required_embedding_rows(publication.chat.tokenizer)
    return build_policy(publication.model, dtype=dtype, vocabulary=vocabulary, seed=publication.seed)


def _as_saved(publication: Publication, saved: PolicyModel, weights: dict[str, Tensor]) -> PolicyModel:
    """What a reader in float32 gets of a model that was trained and saved in less."""
    if publication.model.lora is None or publication.model.publish_lora == "merged":
        return PolicyModel(saved.hf).float()
    model = _untrained(publication, torch.float32)  # the base on disk may have more digits than the training had
    model.load_state_dict({name: value for name, value in weights.items() if "lora_" in name}, strict=False)
    return model.eval()


def _generation_config(model: PolicyModel, chat: ChatFormat) -> GenerationConfig:
    """The base model's settings, ending where responses ended in training, and nowhere else."""
    settings = model.hf.generation_config or GenerationConfig()
    settings.eos_token_id = list(chat.end_token_ids)
    settings.pad_token_id = chat.tokenizer.pad_token_id
    return settings


def _float32_values(model: PolicyModel, rows: list[Row]) -> Tensor:
    """Computed by this process."""
    with torch.no_grad():
        return torch.stack([_per_token(model((length_bucket([row]),)), row) for row in rows])


def _per_token(output: PolicyOutput, row: Row) -> Tensor:
    return output.logprobs[0].sum() / int(row.response[1:].sum())
