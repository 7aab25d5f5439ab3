"""Run in a fresh process: does the saved folder, opened with plain Transformers, give the scores of training?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data.batching import LengthBucket
from rlhf.models.kernels import exact_attention
from rlhf.train.reloading import check_texts, opening_type, padded, placed

Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(tokens, mask, positions) -> scores`` of padded rows."""


def check(folder: Path, request: dict[str, Any]) -> dict[str, float]:
    """Largest differences from the expected scores: one by one, and batched with either padding side."""
    trusted = request["trust_remote_code"]
    tokenizer, cases = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted), request["rows"]
    check_texts(tokenizer, request["texts"])
    rows = [case["tokens"] for case in cases]
    score, reads_left_padding = (plain_scorer if request["plain"] else own_scorer)(folder, trusted, request)
    expected = torch.tensor([case["value"] for case in cases])
    pad = tokenizer.pad_token_id
    single = torch.cat([score(*padded([row], pad, "right")) for row in rows])
    found = {"single": float((single - expected).abs().max())}
    few = sorted(range(len(rows)), key=lambda place: len(rows[place]))[:4]
    for side in ("right", "left") if reads_left_padding else ("right",):
        scores = score(*padded([rows[place] for place in few], pad, side))
        found[f"batched, {side}-padded"] = float((scores - expected[few]).abs().max())
    return found


def plain_scorer(folder: Path, trusted: bool, request: dict[str, Any]) -> tuple[Scorer, bool]:
    """The scores of plain Transformers, and whether padding may stand on the left: encoders pool at the first place."""
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    opened = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=opening_type(folder, request),
        trust_remote_code=trusted,
        attn_implementation=exact_attention(settings),
    )
    model, device = placed(opened, request)
    is_decoder = hasattr(model, "score")

    @torch.inference_mode()
    def score(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        # Learned absolute positions must be told where a left-padded text starts; rotary ones do not care.
        extra = {"position_ids": positions.to(device)} if is_decoder else {}
        logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device), **extra).logits
        return logits.float().mean(dim=1).cpu()

    return score, is_decoder


def own_scorer(folder: Path, trusted: bool, request: dict[str, Any]) -> tuple[Scorer, bool]:
    from reward.saving import load_reward_model

    shared = bool(request.get("on_all_ranks"))
    opened = load_reward_model(folder, dtype=torch.float32, trust_remote_code=trusted, shared=shared)
    model, device = placed(opened, request)

    @torch.inference_mode()
    def score(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        tokens, mask = tokens.to(device), mask.bool().to(device)
        if shared:  # weights are whole in a forward call alone, which reads texts that are padded on the right
            return model((LengthBucket(tokens=tokens, token_mask=mask, response_mask=mask),)).rewards.cpu()
        return model.score(tokens, mask)

    return score, model.is_decoder and not shared
