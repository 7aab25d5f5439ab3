"""What all ranks know of the pairs at hand: their rewards, embeddings and margins, without gradient."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf.data.batching import Batch
from rlhf.engine.ranks import Ranks


@dataclass(frozen=True)
class Pairs:
    """B pairs, detached. The fields that a loss or margin has no use for may be ``None``."""

    positions: Tensor
    """``(B,)`` int64 place in the global batch."""
    chosen_rewards: Tensor
    """``(B,)`` float32 rewards of the preferred responses, in logits."""
    rejected_rewards: Tensor
    """``(B,)`` float32 rewards of the other responses, in logits."""
    chosen_embeddings: Tensor
    """``(B, D)`` float32 embeddings of the preferred responses."""
    rejected_embeddings: Tensor
    """``(B, D)`` float32 embeddings of the other responses."""
    data_margins: Tensor
    """``(B,)`` float32 margin that came with the data; not a number where there is none."""

    def __len__(self) -> int:
        return len(self.positions)

    def in_order(self) -> "Pairs":
        """Sorted by position, so that sums do not depend on which rank held which pair."""
        order = self.positions.argsort()
        return Pairs(*(getattr(self, field.name)[order] for field in fields(self)))


def detached_pairs(batch: Batch, chosen_rewards: Tensor, rejected_rewards: Tensor, embeddings: Tensor) -> Pairs:
    """The pairs of one batch.

    Args:
        batch: what was computed.
        chosen_rewards, rejected_rewards: ``(B,)``.
        embeddings: ``(R, D)``, by row of the batch's buckets.
    """
    chosen, rejected = chosen_rewards.detach().float(), rejected_rewards.detach().float()
    chosen_embeddings, rejected_embeddings = batch.sides(embeddings.detach().float())
    return Pairs(
        positions=batch.positions,
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        chosen_embeddings=chosen_embeddings,
        rejected_embeddings=rejected_embeddings,
        data_margins=torch.full_like(chosen, torch.nan) if batch.margins is None else batch.margins,
    )


def gather_pairs(pairs: Pairs, ranks: Ranks) -> Pairs:
    """The pairs of all ranks in order of position, in one ragged all-gather."""
    width = pairs.chosen_embeddings.shape[1]
    # Positions travel as float32, which is exact below 2**24 pairs in a global batch.
    columns = [pairs.positions.float(), pairs.chosen_rewards, pairs.rejected_rewards, pairs.data_margins]
    packed = torch.cat(
        [torch.stack(columns, dim=1), pairs.chosen_embeddings, pairs.rejected_embeddings], dim=1
    )
    rows = ranks.gather_rows(packed)
    positions, chosen, rejected, data_margins = rows[:, :4].unbind(dim=1)
    return Pairs(
        positions.long(), chosen, rejected, rows[:, 4 : 4 + width], rows[:, 4 + width :], data_margins
    ).in_order()


def concatenate(parts: list[Pairs]) -> Pairs:
    """All pairs of several micro-steps, in order of position."""
    return Pairs(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Pairs))).in_order()
