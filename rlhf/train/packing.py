"""Which models take packed sequences: those that say the same of them as of ordinary rows."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.data.batching import Buckets, Row, length_bucket, packed_buckets
from rlhf.engine.frozen import Frozen
from rlhf.models.backbones import embedding_rows
from rlhf.models.packed_attention import Kernel, comparing, kernel_of, kernels_for, set_packing
from rlhf.models.positions import places_of
from rlhf.train.batches import asking
from rlhf.train.probing import padding_of

TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference as a share of the largest number that a model says of the rows; other types: 1e-3."""


def allow_packing(model: Frozen) -> bool:
    """Let ``model`` take packed sequences if it says the same of a few rows either way, or say why not.

    Args:
        model: whose module takes length buckets. Every rank must call it.
    Returns:
        Whether it takes them.
    """
    hf = _hf_of(model)
    if hf is None or not _causal(hf):  # an encoder, or what has a model of another role inside
        return False
    set_packing(hf, None)
    problem = _unfit(hf)
    kernels = () if problem else kernels_for(hf, model.ranks.device)
    if not problem and not kernels:
        problem = f"model.attention = {hf.config._attn_implementation} takes no rows one by one"
    for place, kernel in enumerate(kernels):
        problem = _difference(model, hf, kernel)
        if not model.ranks.any(bool(problem)):
            return True
        if place + 1 < len(kernels):
            _say(model, hf, f"packed rows attend one by one, not by FlexAttention: {problem or ANOTHER}")
    set_packing(hf, None)
    _say(model, hf, f"length buckets, not packed rows: {problem or ANOTHER}")
    return False


ANOTHER = "another rank differs"


def _say(model: Frozen, hf: PreTrainedModel, what: str) -> None:
    if model.ranks.is_main:
        print(f"{type(hf).__name__}: {what}", flush=True)


def _unfit(hf: PreTrainedModel) -> str:
    """Why ``hf`` need not be asked, in words; empty if it is to be."""
    if _draws(hf):
        return "it has dropout, and answers to one prompt would share what is dropped of it"
    return "" if hf._can_set_attn_implementation() else OWN


OWN = "its attention is its own, not one of Transformers' interface"


def _difference(model: Frozen, hf: PreTrainedModel, kernel: Kernel) -> str:
    """Why ``hf`` cannot pack with ``kernel``, in words; empty if it can."""
    limit = TOLERANCE.get(hf.dtype, 1e-3)
    worst = 0.0
    trained = any(parameter.requires_grad for parameter in hf.parameters())
    try:
        for rows in _rows(embedding_rows(hf), padding_of(hf.config), _length(hf, kernel)):
            set_packing(hf, None)
            apart = _said(model, rows)
            if not set_packing(hf, kernel):
                return OWN
            recomputing = trained and hf.is_gradient_checkpointing
            with comparing(gradients=trained, recomputing=recomputing) as differences:
                together = _said(model, rows)
            worst = max(worst, float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-30)))
            if not max(differences, default=0.0) <= limit:
                what = "or its gradients are others" if trained else "is another"
                return f"its attention {what}, by {max(differences):.2g} of the largest number ({limit})"
    except Exception as error:  # whatever a model's own code raises
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "" if worst <= limit else f"it says something else of them, {worst:.2g} of the largest number ({limit})"


def may_pack(hf: PreTrainedModel) -> bool:
    """Whether models of this kind are asked at all: causal ones that attend by Transformers' interface."""
    return _causal(hf) and bool(hf._can_set_attn_implementation())


def packs(model: Frozen) -> bool:
    """Whether :func:`allow_packing` found that ``model`` takes packed sequences."""
    hf = _hf_of(model)
    return hf is not None and kernel_of(hf) is not None


def _hf_of(model: Frozen) -> PreTrainedModel | None:
    return next((part for part in model.module.modules() if isinstance(part, PreTrainedModel)), None)


def _causal(hf: PreTrainedModel) -> bool:
    """Encoders read whole texts, in a way of their own."""
    return hasattr(hf, "score") or hf.get_output_embeddings() is not None


def _draws(hf: PreTrainedModel) -> bool:
    for part in hf.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(part).items()):
            return True
    return False


def _length(hf: PreTrainedModel, kernel: Kernel) -> int:
    """Tokens of a prompt that shows what there is to see: FlexAttention has blocks of 128, some of them seen whole."""
    places = places_of(hf.config.get_text_config())
    return 180 if kernel == "flex" and (places is None or places >= 450) else 6


def _rows(vocabulary: int, pad: int | None, length: int) -> Iterator[list[Row]]:
    """Answers to one prompt of ``length`` tokens and a row of its own, all of different lengths; and rows that have
    nothing in common."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, 8 * length)
    tokens = tokens[tokens != pad]
    ends = [length * part // 6 for part in (6, 15, 19, 26, 40)]
    prompt, *rest, _ = np.split(tokens, ends)
    for texts in (
        [np.concatenate([prompt, rest[0]]), np.concatenate([prompt, rest[1]]), rest[2], prompt[: length * 2 // 3]],
        [prompt, rest[0], rest[1], rest[2]],
    ):
        yield [Row(text, np.arange(len(text)) > 0) for text in texts]


@torch.no_grad()
def _said(model: Frozen, rows: list[Row]) -> Tensor:
    """All numbers that ``model`` says of ``rows`` in two buckets, which a model that does not pack takes one by one."""
    buckets: Buckets = packed_buckets([length_bucket([rows[0], rows[2]]), length_bucket([rows[3], rows[1]])])
    with asking(model):
        said = model.forward(buckets.to(model.ranks.device))
    return torch.cat([values.detach().float().flatten() for values in _tensors(said)])


def _tensors(said: Any) -> Iterator[Tensor]:
    if isinstance(said, Tensor):
        yield said
    elif dataclasses.is_dataclass(said):
        for field in dataclasses.fields(said):
            yield from _tensors(getattr(said, field.name))
    elif isinstance(said, tuple):
        for each in said:
            yield from _tensors(each)
