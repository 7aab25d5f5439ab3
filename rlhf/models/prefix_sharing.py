"""Whether a model gives tokens the same states in packed rows; see :mod:`rlhf.core.packing`."""

import sys

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.core.packing import pack
from rlhf.models.hidden_states import last_states

TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of a state as a share of the usual size of states; other types: 1e-3."""
LENGTHS = (6, 4, 7)
"""Tokens of the common beginning and of what follows it."""


@torch.no_grad()
def longest_packed_row(hf: PreTrainedModel) -> int:
    """The longest packed row that ``hf`` computes exactly, in tokens: 0 if it computes none.

    A few tokens show it. Models that slide a window over the text keep to it only up to its width, since the mask of a
    packed row knows no window. Kernels that take no mask are not asked.
    """
    settings = hf.config.get_text_config()
    if getattr(hf.config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return 0
    was_training = hf.training
    try:
        hf.eval()
        exact = _is_exact(hf, settings.vocab_size)
    except Exception:  # whatever a model's own code raises for a mask or positions that it does not know
        exact = False
    finally:
        hf.train(was_training)
    window = getattr(settings, "sliding_window", None)
    return 0 if not exact else window if isinstance(window, int) and window > 0 else sys.maxsize


def _is_exact(hf: PreTrainedModel, vocabulary: int) -> bool:
    tokens = (np.arange(sum(LENGTHS) + 1) * 7919 + 11) % vocabulary
    tokens = tokens[tokens != hf.config.get_text_config().pad_token_id][: sum(LENGTHS)]
    common, first, second = np.split(tokens, np.cumsum(LENGTHS[:-1]))
    rows = [np.concatenate([common, own]) for own in (first, second)]
    (together,) = last_states(hf, [pack([rows]).to(hf.device)])
    for row, states in zip(rows, together, strict=True):
        (alone,) = last_states(hf, [torch.from_numpy(row)[None].to(hf.device)])
        difference = (states[: len(row)] - alone[0]).abs().max()
        if not float(difference) <= TOLERANCE.get(hf.dtype, 1e-3) * float(alone.float().square().mean().sqrt()):
            return False
    return True
