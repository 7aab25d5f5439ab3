"""The manifest of a published reward model, gathered from the run."""

import json
from dataclasses import asdict
from pathlib import Path

from reward.config import RewardConfig
from reward.evaluate import Evaluation
from rlhf.data.preferences import LoadedPreferences
from rlhf.data.templates import ChatFormat
from rlhf.models.manifest import Manifest, RewardStatistics
from rlhf.models.tokenizer import pad_policy


def reward_manifest(
    config: RewardConfig, data: LoadedPreferences, chat: ChatFormat, evaluation: Evaluation | None
) -> Manifest:
    rewards = None
    if evaluation is not None:
        rewards = RewardStatistics(
            mean=evaluation.reward_mean,
            standard_deviation=evaluation.reward_sd,
            count=2 * evaluation.accuracy.pairs,
        )
    return Manifest(
        stage="reward",
        base_model=config.model.path,
        template_digest=chat.digest,
        tokenizer_digest=chat.tokenizer_digest,
        pad_policy=pad_policy(chat.tokenizer),
        vocabulary_size=len(chat.tokenizer),
        head_kind=config.model.head,
        head_dtype="float32",
        rewards=rewards,
        margin_statistics=_last_margins(config.output / "metrics.jsonl"),
        loss={"loss": asdict(config.loss), "margin": asdict(config.margin)},
        training_data=data.train.fingerprint,
    )


def _last_margins(path: Path) -> dict[str, float]:
    """Margin telemetry of the last training step that was logged."""
    if not path.is_file():
        return {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        if "margin/mean" in row:
            return {name: value for name, value in row.items() if name.startswith("margin/") and value is not None}
    return {}
