"""The reward that a policy implies: what DPO has taught it, as a score of single answers."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.data.batching import Row, length_bucket
from rlhf.engine.frozen import Frozen


@torch.inference_mode()
def response_logprobs(model: Frozen, rows: Sequence[Row], *, batch_tokens: int) -> list[float]:
    """Log-probability of the response of each row, in nats, summed over its tokens; in the order of ``rows``.

    Args:
        model: its module is a :class:`policy.model.PolicyModel`.
        rows: with True on response tokens.
        batch_tokens: padded tokens at once.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].tokens))
    found = np.zeros(len(rows))
    start = 0
    while start < len(order):
        places = order[start : start + max(1, batch_tokens // len(rows[order[start]].tokens))]
        start += len(places)
        bucket = length_bucket([rows[place] for place in places]).to(model.ranks.device)
        (values,) = model.forward((bucket,)).logprobs
        found[places] = values.double().sum(dim=1).cpu().numpy()
    return found.tolist()
