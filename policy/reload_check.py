"""Run in a fresh process: does the saved folder, opened with plain Transformers, give the live log-probabilities?

Every row also has its response mask; its "value" is the mean log-probability of its response tokens, in nats. Behind
each of the "ends" of the request, plain ``generate`` must stop.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from rlhf.models.adapters import adapter_base, beside_adapter, saved_embedding_rows, with_adapter
from rlhf.models.kernels import exact_attention
from rlhf.train.reloading import check_texts, opening_type, padded, placed

CPU = torch.device("cpu")


@torch.inference_mode()
def check(folder: Path, request: dict[str, Any]) -> dict[str, float]:
    """Largest differences from the expected values: one by one, and batched with either padding side."""
    trusted = request["trust_remote_code"]
    tokenizer, cases = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted), request["rows"]
    check_texts(tokenizer, request["texts"])
    rows = [case["tokens"] for case in cases]
    model, device = placed(open_policy(folder, trusted, request), request)
    check_ends(model, tokenizer, rows[0], request["ends"], device)
    expected = torch.tensor([case["value"] for case in cases])
    masks = [case["response"] for case in cases]

    def off(batch: list[int], side: str) -> float:
        tokens, mask, positions = padded([rows[i] for i in batch], tokenizer.pad_token_id, side)
        selected = torch.zeros_like(mask, dtype=torch.bool)
        selected[mask.bool()] = torch.tensor([flag for i in batch for flag in masks[i]])
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        logits = model(**{name: value.to(device) for name, value in given.items()}).logits[:, :-1].float().cpu()
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


def open_policy(folder: Path, trusted: bool = False, request: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Open a policy as a plain user would; the base of an adapter with a larger embedding must be grown first."""
    base = adapter_base(folder)
    origin, revision = (folder, None) if base is None else (base.path, base.revision)
    settings = AutoConfig.from_pretrained(origin, revision=revision, trust_remote_code=trusted)
    dtype = opening_type(Path(origin), request or {})
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted}
    options["attn_implementation"] = exact_attention(settings)
    if base is None or saved_embedding_rows(folder) is None:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        if base is not None:  # plain Transformers takes the settings of the adapter's base
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model
    model = AutoModelForCausalLM.from_pretrained(base.path, revision=base.revision, **options)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    if (request or {}).get("on_all_ranks"):  # merged, each rank would have all weights for itself
        beside_adapter(model, folder)
        return model
    return with_adapter(model, folder)


class Forced(LogitsProcessor):
    """Makes the first new token the one given."""

    def __init__(self, length: int, token: int) -> None:
        self._length, self._token = length, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self._length:
            return scores
        token = torch.tensor([self._token], device=scores.device)
        return torch.full_like(scores, -torch.inf).index_fill_(1, token, 0.0)


def check_ends(model: Any, tokenizer: Any, prompt: list[int], ends: list[int], device: torch.device = CPU) -> None:
    """Let the model write each end token once, with the saved settings.

    Raises:
        SystemExit: if ``generate`` goes on behind one.
    """
    tokens = torch.tensor([prompt], device=device)
    for end in ends:
        forced = LogitsProcessorList([Forced(len(prompt), end)])
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=3,
            do_sample=False,
            logits_processor=forced,
            tokenizer=tokenizer,  # asked for where the generation config has stop strings
        )[0, len(prompt) :]
        if written.tolist() != [end]:
            name = tokenizer.convert_ids_to_tokens(end)
            raise SystemExit(f"the saved model does not stop behind {name} (token {end}), as answers in training did")
