"""From trained weights to ``final/``: saved, reloaded by a fresh process, compared, and only then named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward.config import RewardConfig
from reward.model import RewardModel, build_reward_model, save_reward_model
from rlhf.core.files import staged_directory
from rlhf.data.batching import Row, length_bucket
from rlhf.data.preferences import PreferenceDataset
from rlhf.engine.api import Engine
from rlhf.models.manifest import Manifest, write_manifest
from rlhf.models.tokenizer import required_embedding_rows
from rlhf.train.publishing import check_in_fresh_process, check_low_precision, live_outputs, readable_cases, sample_rows

LOW_PRECISION_TOLERANCE = 0.1
"""How far bfloat16 scores of training may be from float32 scores of the same weights, in logits."""


@dataclass(frozen=True)
class Publication:
    """What goes into ``final/`` besides the weights."""

    config: RewardConfig
    dtype: torch.dtype
    tokenizer: Any
    """With the chat template that plain users should get."""
    manifest: Manifest


def publish(engine: Engine, data: PreferenceDataset, publication: Publication, target: Path) -> dict[str, float]:
    """Write ``target`` atomically after a fresh process has reproduced the live scores.

    Returns:
        The largest difference to the live scores, by way of padding.
    Raises:
        ModelError: if the saved model scores differently; an earlier ``target`` stays as it was.
    """
    rows = sample_rows(data)
    live = torch.cat([scores.rewards for scores in live_outputs(engine, rows)]).float().cpu()
    weights = engine.full_state_dict()
    return engine.ranks.on_main(lambda: _write(publication, weights, rows, live, target))


def _write(
    publication: Publication, weights: dict[str, Tensor], rows: list[Row], live: Tensor, target: Path
) -> dict[str, float]:
    config = publication.config
    model = _rebuild(publication, weights)
    with staged_directory(target) as staged:
        save_reward_model(model, staged)
        publication.tokenizer.save_pretrained(staged)
        write_manifest(staged, publication.manifest)
        expected = live
        if publication.dtype != torch.float32:
            expected = _float32_scores(model, rows)
            check_low_precision(live, expected, LOW_PRECISION_TOLERANCE)
        request = {
            "plain": config.model.head == "linear",
            "rows": readable_cases(rows, expected, publication.tokenizer),
        }
        return check_in_fresh_process("reward.reload_check", staged, request)


def _rebuild(publication: Publication, weights: dict[str, Tensor]) -> RewardModel:
    """A copy on the CPU with the trained weights, adapters still apart."""
    config = publication.config
    model = build_reward_model(
        config.model,
        dtype=publication.dtype,
        pad_token_id=publication.tokenizer.pad_token_id,
        vocabulary=required_embedding_rows(publication.tokenizer),
        seed=config.train.seed,
        with_lm_head=any(name.startswith("lm_head.") for name in weights),
    )
    model.load_state_dict(weights)
    return model.eval()


def _float32_scores(model: RewardModel, rows: list[Row]) -> Tensor:
    """Scores of the weights as saved, computed in float32 by this process."""
    model = model.float()
    with torch.no_grad():
        return torch.cat([model((length_bucket([row]),)).rewards for row in rows])
