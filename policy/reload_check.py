"""Run in a fresh process: does the saved folder, opened with plain Transformers, give the live log-probabilities?

    python -m policy.reload_check FOLDER REQUEST.json

Every row also has its response mask; its "value" is the mean log-probability of its response tokens, in nats.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.train.reloading import encoded, padded, reload_main


@torch.inference_mode()
def check(folder: Path, request: dict[str, Any]) -> dict[str, float]:
    """Largest differences from the expected values: one by one, and batched with either padding side."""
    tokenizer, cases = AutoTokenizer.from_pretrained(folder), request["rows"]
    rows = encoded(tokenizer, cases)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = torch.tensor([case["value"] for case in cases])
    masks = [case["response"] for case in cases]

    def off(batch: list[int], side: str) -> float:
        tokens, mask, positions = padded([rows[i] for i in batch], tokenizer.pad_token_id, side)
        selected = torch.zeros_like(mask, dtype=torch.bool)
        selected[mask.bool()] = torch.tensor([flag for i in batch for flag in masks[i]])
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits[:, :-1].float()
        # Not cross_entropy on transposed logits: its float32 sum over the vocabulary is off by 1e-4.
        logprobs = logits.gather(2, tokens[:, 1:, None]).squeeze(2) - logits.logsumexp(dim=2)
        selected = selected[:, 1:]
        means = (logprobs * selected).sum(dim=1) / selected.sum(dim=1)
        return float((means - expected[batch]).abs().max())

    few = sorted(range(len(rows)), key=lambda i: len(rows[i]))[:4]  # whole logits of long rows take memory
    return {
        "single": max(off([i], "right") for i in range(len(rows))),
        "batched, right-padded": off(few, "right"),
        "batched, left-padded": off(few, "left"),
    }


if __name__ == "__main__":
    sys.exit(reload_main(check))
