"""What ranks say of themselves while they are busy: short texts that any of them can read at any time."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from rlhf.engine.ranks import Ranks

_SECONDS = 30.0


class Board:
    """A text of each rank, kept where the ranks have met. No rank waits for another here."""

    def __init__(self, ranks: Ranks) -> None:
        """Open a connection of its own: the one of the collectives may be in use for long.

        Raises:
            RuntimeError: if it cannot be opened.
        """
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=_SECONDS)
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self._store, self._ranks = dist.PrefixStore("board", store), ranks

    def write(self, text: str) -> None:
        """Say ``text`` in the place of what this rank said before."""
        self._store.set(str(self._ranks.rank), text)

    def read(self) -> Mapping[int, str]:
        """What each rank said last; those that have said nothing yet are left out."""
        there = [rank for rank in range(self._ranks.world_size) if self._store.check([str(rank)])]
        return {rank: self._store.get(str(rank)).decode() for rank in there}
