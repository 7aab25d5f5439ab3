"""What an audit (``rlhf data audit``) says of the label of a pair, and whether it is this pair that it speaks of."""

import json
import math

from rlhf.core.files import digest
from rlhf.data.records import PreferenceRecord, prompt_key

SWAP_ABOVE = 0.5
"""Probability above which a label is more likely wrong than right."""
OF_ANOTHER_PAIR = -1.0
"""Stands for the probability of a label that was judged before its pair changed."""


def pair_digest(record: PreferenceRecord) -> str:
    """A name for what was audited: another prompt, answer or order of the answers has another name."""
    sides = (json.dumps(side, sort_keys=True, ensure_ascii=False) for side in (record.chosen, record.rejected))
    return digest(str(prompt_key(record.prompt)), *sides)


def wrong_label(record: PreferenceRecord) -> float:
    """Probability that the label is wrong; nan where none is given, :data:`OF_ANOTHER_PAIR` where it is of another."""
    if record.wrong is None:
        return math.nan
    return record.wrong if record.audited_pair in ("", pair_digest(record)) else OF_ANOTHER_PAIR
