"""Run in a fresh process: does the saved folder, opened with plain Transformers, give the scores of training?

    python -m reward.reload_check FOLDER REQUEST.json
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.train.reloading import encoded, padded, reload_main

Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(tokens, mask, positions) -> scores`` of padded rows."""


def check(folder: Path, request: dict[str, Any]) -> dict[str, float]:
    """Largest differences from the expected scores: one by one, and batched with either padding side."""
    tokenizer, cases = AutoTokenizer.from_pretrained(folder), request["rows"]
    rows = encoded(tokenizer, cases)
    score = plain_scorer(folder) if request["plain"] else own_scorer(folder)
    expected = torch.tensor([case["value"] for case in cases])
    found = {"single": torch.cat([score(*padded([row], tokenizer.pad_token_id, "right")) for row in rows])}
    for side in ("right", "left"):
        found[f"batched, {side}-padded"] = score(*padded(rows, tokenizer.pad_token_id, side))
    return {name: float((scores - expected).abs().max()) for name, scores in found.items()}


def plain_scorer(folder: Path) -> Scorer:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        # Learned absolute positions must be told where a left-padded text starts; rotary ones do not care.
        extra = {"position_ids": positions} if hasattr(model, "score") else {}
        return model(input_ids=tokens, attention_mask=mask, **extra).logits[:, 0].float()

    return score


def own_scorer(folder: Path) -> Scorer:
    from reward.model import load_reward_model

    model = load_reward_model(folder, dtype=torch.float32).eval()
    return torch.inference_mode()(lambda tokens, mask, positions: model.score(tokens, mask.bool()))


if __name__ == "__main__":
    sys.exit(reload_main(check))
