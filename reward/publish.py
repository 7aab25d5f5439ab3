"""From trained weights to ``final/``: saved, reloaded by a fresh process, compared, and only then named."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward.config import RewardConfig
from reward.model import RewardModel, build_reward_model, save_reward_model
from rlhf.core.errors import ModelError
from rlhf.core.files import staged_directory
from rlhf.core.masking import length_mask
from rlhf.data.batching import RowGroup
from rlhf.data.preferences import PreferenceDataset
from rlhf.engine.api import Engine
from rlhf.models.manifest import Manifest, write_manifest
from rlhf.models.tokenizer import required_embedding_rows

CASES = 12
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
    rows = _sample_rows(data)
    live = live_scores(engine, rows)
    weights = engine.full_state_dict()
    return engine.ranks.on_main(lambda: _write(publication, weights, rows, live, target))


def live_scores(engine: Engine, rows: list[np.ndarray]) -> Tensor:
    """``(R,)`` scores by the model under training, row by row. Every rank must call it."""
    module, device = engine.module, engine.ranks.device
    was_training = module.training
    module.eval()
    with torch.no_grad():
        scores = [engine.forward((_single_row(row).to(device),)).rewards for row in rows]
    module.train(was_training)
    return torch.cat(scores).float().cpu()


def _write(
    publication: Publication, weights: dict[str, Tensor], rows: list[np.ndarray], live: Tensor, target: Path
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
            _check_low_precision(live, expected)
        return _reload(staged, publication.tokenizer, rows, expected, plain=config.model.head == "linear")


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


def _reload(staged: Path, tokenizer: Any, rows: list[np.ndarray], expected: Tensor, *, plain: bool) -> dict[str, float]:
    cases = [
        {"text": tokenizer.decode(row), "tokens": row.tolist(), "score": score}
        for row, score in zip(rows, expected.tolist(), strict=True)
    ]
    cases = [case for case in cases if tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["tokens"]]
    if not cases:
        raise ModelError(f"{staged}: no sample row survives decoding and encoding again; the tokenizer is lossy")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cases.json"
        path.write_text(json.dumps({"plain": plain, "rows": cases}))
        command = [sys.executable, "-m", "reward.reload_check", str(staged), str(path)]
        outcome = subprocess.run(command, capture_output=True, text=True, env=_plain_environment(), check=False)
    report = outcome.stdout.strip().splitlines()[-1:] or [outcome.stderr[-2000:]]
    if outcome.returncode != 0:
        raise ModelError(
            f"the saved model does not reproduce the live scores, so it is not published: {report[0]}; "
            "the checkpoints are intact"
        )
    return json.loads(report[0])


def _plain_environment() -> dict[str, str]:
    """Without what a launcher set: the fresh process is nobody's rank, and it reads files only."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "TORCHELASTIC_", "DS_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))
    return kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def _float32_scores(model: RewardModel, rows: list[np.ndarray]) -> Tensor:
    """Scores of the weights as saved, computed in float32 by this process."""
    model = model.float()
    with torch.no_grad():
        return torch.cat([model((_single_row(row),)).rewards for row in rows])


def _check_low_precision(live: Tensor, expected: Tensor) -> None:
    worst = float((live - expected).abs().max())
    if worst > LOW_PRECISION_TOLERANCE:
        raise ModelError(
            f"scores in training precision and in float32 differ by {worst:.3f}, more than "
            f"{LOW_PRECISION_TOLERANCE}; the model is not published, the checkpoints are intact"
        )


def _sample_rows(data: PreferenceDataset) -> list[np.ndarray]:
    """Rows of very different lengths, both sides of some pairs."""
    order = np.argsort(data.lengths.sum(axis=1), kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, CASES // 2).astype(int))]
    pairs = [data.pair(int(index)) for index in chosen]
    return [row for pair in pairs for row in (pair.chosen, pair.rejected)]


def _single_row(row: np.ndarray) -> RowGroup:
    tokens = torch.from_numpy(row.astype(np.int64))[None]
    mask = length_mask(torch.tensor([len(row)]), len(row))
    return RowGroup(tokens=tokens, token_mask=mask, response_mask=mask)
