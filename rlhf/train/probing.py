"""What it takes to ask a freshly loaded model about a few tokens."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.data.batching import Row
from rlhf.models.kernels import exact_attention

LENGTHS = 5, 9


def padding_of(settings: PretrainedConfig) -> int | None:
    """The padding token of a model; some kinds of models know none."""
    return getattr(settings.get_text_config(), "pad_token_id", None)


def probe_rows(vocabulary: int, pad: int | None) -> list[Row]:
    """Two rows of tokens from all over the vocabulary, without the padding token, all response but the first."""
    tokens = (np.arange(sum(LENGTHS) + 1) * 7919 + 11) % vocabulary
    tokens = tokens[tokens != pad][: sum(LENGTHS)]
    parts = np.split(tokens, [LENGTHS[0]])
    return [Row(part, np.arange(len(part)) > 0) for part in parts]


@contextlib.contextmanager
def attention_of_any_device(hf: PreTrainedModel) -> Iterator[None]:
    """Let attention that needs a GPU give way to what the CPU has inside the block; logits are the same."""
    plain = exact_attention(hf.config) or ("sdpa" if getattr(hf, "_supports_sdpa", False) else "eager")
    settings: dict[int, Any] = {id(part.config): part.config for part in hf.modules() if _needs_gpu(part)}
    before = {key: each._attn_implementation_internal for key, each in settings.items()}
    try:
        for each in settings.values():
            each._attn_implementation_internal = plain
        yield
    finally:
        for key, each in settings.items():
            each._attn_implementation_internal = before[key]


def _needs_gpu(part: nn.Module) -> bool:
    wanted = getattr(getattr(part, "config", None), "_attn_implementation", None)
    return wanted not in (None, "sdpa", "eager")
