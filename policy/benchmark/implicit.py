"""The reward that a policy implies: what DPO has taught it, as a score of single answers."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.data.batching import Row, batches_by_length, length_bucket
from rlhf.engine.frozen import Frozen


@torch.inference_mode()
def response_logprobs(model: Frozen, rows: Sequence[Row], *, batch_tokens: int) -> list[float]:
    """Log-probability of the response of each row, in nats, summed over its tokens; in the order of ``rows``.

    Args:
        model: its module is a :class:`policy.model.PolicyModel`.
        rows: with True on response tokens.
        batch_tokens: padded tokens at once.
    """
    found = np.zeros(len(rows))
    for places in batches_by_length([len(row.tokens) for row in rows], batch_tokens):
        bucket = length_bucket([rows[place] for place in places]).to(model.ranks.device)
        (values,) = model.forward((bucket,)).logprobs
        found[places] = values.double().sum(dim=1).cpu().numpy()
    return found.tolist()
