"""Run in a fresh process: does the saved folder, opened with plain Transformers, give the scores of training?

    python -m reward.reload_check FOLDER CASES.json

Every case has the text, its tokens and its score as "value". Prints one JSON object and exits with 1 if a score is off.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TOLERANCE = 1e-4
Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Scores ``(R,)`` of tokens, mask and positions, each ``(R, T)``."""


def check(folder: Path, cases: list[dict], *, plain: bool) -> dict:
    """Largest differences from the expected scores: one by one, and batched with either padding side."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(case["text"], add_special_tokens=False)["input_ids"] for case in cases]
    for row, case in zip(rows, cases, strict=True):
        if row != case["tokens"]:
            raise SystemExit(f"the saved tokenizer splits the text differently: {case['text'][:200]!r}")
    score = plain_scorer(folder) if plain else own_scorer(folder)
    expected = torch.tensor([case["value"] for case in cases])
    found = {"single": torch.cat([score(*padded([row], tokenizer.pad_token_id, "right")) for row in rows])}
    for side in ("right", "left"):
        found[f"batched, {side}-padded"] = score(*padded(rows, tokenizer.pad_token_id, side))
    return {name: float((scores - expected).abs().max()) for name, scores in found.items()}


def plain_scorer(folder: Path) -> Scorer:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # Learned absolute positions must be told where a left-padded text starts; rotary ones do not care.
        extra = {"position_ids": positions} if hasattr(model, "score") else {}
        return model(input_ids=tokens, attention_mask=mask, **extra).logits[:, 0].float()

    return score


def own_scorer(folder: Path) -> Scorer:
    from reward.model import load_reward_model

    model = load_reward_model(folder, dtype=torch.float32).eval()
    return torch.inference_mode()(lambda tokens, mask, positions: model.score(tokens, mask.bool()))


def padded(rows: list[list[int]], pad: int, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[place, span] = torch.tensor(row)
        mask[place, span] = 1
    return tokens, mask, (mask.cumsum(dim=1) - 1).clamp_min(0)


def main() -> int:
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    differences = check(folder, cases["rows"], plain=cases["plain"])
    print(json.dumps(differences))
    return 0 if all(value <= TOLERANCE for value in differences.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
