"""What an audit (``rlhf data audit``) says of the label of a pair, in columns of its row."""

import json

from rlhf.core.files import digest
from rlhf.data.records import PreferenceRecord, prompt_key

AUDIT_COLUMNS = (
    "audit_margin",
    "audit_margin_sd",
    "audit_wrong",
    "audit_weight",
    "audit_label",
    "audit_pair",
)
"""Columns that an audit adds: margin with its spread over repeats, probability that the label is wrong, one minus that,
the label that it suggests (as_given or swap), and :func:`pair_digest`."""
SWAP_ABOVE = 0.5
"""Probability above which a label is more likely wrong than right."""


def pair_digest(record: PreferenceRecord) -> str:
    """A name for what was audited: another prompt, answer or order of the answers has another name."""
    sides = (json.dumps(side, sort_keys=True, ensure_ascii=False) for side in (record.chosen, record.rejected))
    return digest(str(prompt_key(record.prompt)), *sides)
