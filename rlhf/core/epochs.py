"""How the items of an epoch make batches. Known without torch: recipes ask for it."""

from typing import Literal

LastBatch = Literal["keep", "merge", "drop"]
"""What becomes of the items that are left at the end of an epoch: a batch of their own; joined to the batch before, if
they are less than half of one; or left out until another epoch. Fewer items than one batch are always kept."""


def steps_per_epoch(items: int, batch_size: int, last: LastBatch = "keep") -> int:
    """Batches of an epoch."""
    whole, left = divmod(items, batch_size)
    if last == "drop" or (last == "merge" and 2 * left < batch_size):
        return max(whole, min(left, 1))
    return whole + min(left, 1)
