"""Held-out pairs with their rewards, and with their texts where these are worth reading."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf.data.preferences import PreferenceDataset
from rlhf.train.held_out import shortened

READ = 8
"""Pairs of each kind whose texts are kept: most misranked, least decided, most decided."""


def pair_rows(
    data: PreferenceDataset, rewards: NDArray[np.float64], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """A row for ``held_out.jsonl`` of each pair; ``value`` is 1 where it is in the right order, 0.5 for a tie.

    Args:
        data: N pairs.
        rewards: ``(N, 2)`` of chosen and rejected, plain or implicit.
        tokenizer: that the pairs were tokenized with.
    """
    gaps = rewards[:, 0] - rewards[:, 1]
    order, narrow = np.argsort(gaps, kind="stable"), np.argsort(np.abs(gaps), kind="stable")
    read = {*order[:READ].tolist(), *order[-READ:].tolist(), *narrow[:READ].tolist()}
    for place, (gap, (chosen, rejected)) in enumerate(zip(gaps.tolist(), rewards.tolist(), strict=True)):
        row: dict[str, Any] = {
            "row": data.row_id(place),
            "group": f"{int(data.prompt_keys[place]):016x}",
            "value": 0.5 * (np.sign(gap).item() + 1),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_tokens": int(data.lengths[place, 0]),
            "rejected_tokens": int(data.lengths[place, 1]),
        }
        scores = data.scores[place].tolist()
        if not np.isnan(scores).any():
            row |= dict(zip(("chosen_score", "rejected_score"), scores, strict=True))
        yield row | (_texts(data, place, tokenizer) if place in read else {})


def _texts(data: PreferenceDataset, place: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    pair = data.pair(place)
    parts = {
        "prompt": pair.chosen[: pair.chosen_response_start],
        "chosen": pair.chosen[pair.chosen_response_start :],
        "rejected": pair.rejected[pair.rejected_response_start :],
    }
    return {
        name: shortened(str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip())
        for name, tokens in parts.items()
    }
