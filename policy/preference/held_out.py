"""Held-out items of the preference stage with their implicit rewards, for ``held_out.jsonl``."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policy.preference.columns import SIDES, implicit_rewards
from policy.preference.config import LossConfig
from policy.preference.telemetry import labeled_right
from reward.held_out import pair_rows
from rlhf.data.batching import ItemSource
from rlhf.data.examples import ExampleDataset
from rlhf.data.preferences import PreferenceDataset


def held_out_rows(
    data: ItemSource, seen: Mapping[str, Tensor], loss: LossConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """A row of each item of ``data``; ``seen`` are its columns, which are not empty."""
    if isinstance(data, PreferenceDataset):
        rewards = np.stack([implicit_rewards(seen, loss, side).double().cpu().numpy() for side in SIDES], axis=1)
        yield from pair_rows(data, rewards, tokenizer)
        return
    assert isinstance(data, ExampleDataset)
    implied, right = (loss.beta * seen["logratios"]).tolist(), labeled_right(seen, loss).tolist()
    for place, (reward, is_right) in enumerate(zip(implied, right, strict=True)):
        yield {
            "row": data.row_id(place),
            "group": f"{int(data.prompt_keys[place]):016x}",
            "value": float(is_right),
            "reward": reward,
            "desirable": bool(seen["labels"][place]),
        }
