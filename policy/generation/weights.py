"""Where rollouts get their weights from: the model under training, or under ZeRO-3 a whole copy of it."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from rlhf.core.memory import free_memory
from rlhf.engine.frozen import Frozen, ReplicatedModel
from rlhf.train.stage import say

GIB = 2**30
FREE_SHARE = 0.5
"""Share of the free memory that a copy may take: caches, activations and optimizer states come on top."""


class RolloutWeights:
    """The model to sample from.

    Under ZeRO-3 every forward fetches all weights from the other ranks: for each token of a response. A whole
    copy on every rank is fetched once for a rollout instead, and sampled from without a word between the ranks.
    Every rank must make the same calls.

    Args:
        engine: the model under training.
        build: makes a policy of the same shape and type of weights, on the CPU; called only if a copy is wanted.
        choice: "once": hold a copy; "never": sample from the shares; "auto": hold one if it takes at most half of
            the free memory on every rank. Without ZeRO-3 there is nothing to choose.

    Attributes:
        model: what a sampler asks.
        synced: whether the sampler must keep all ranks together, forward by forward.
    """

    def __init__(
        self, engine: Frozen, build: Callable[[], nn.Module], choice: Literal["auto", "once", "never"] = "auto"
    ) -> None:
        self._engine, self._whole_once = engine, False
        self._copy: ReplicatedModel | None = None
        sharded = any(hasattr(parameter, "ds_id") for parameter in engine.module.parameters())
        if sharded and _wants_copy(engine, choice):
            self._copy = ReplicatedModel(engine.ranks.together(build), engine.ranks)
        self.model: Frozen = engine if self._copy is None else self._copy
        self.synced = sharded and self._copy is None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what training has changed. Every rank must call it before it samples."""
        if self._copy is None:
            return
        pairs = zip(self._copy.module.parameters(), self._engine.module.parameters(), strict=True)
        for mine, trained in pairs:
            if trained.requires_grad or not self._whole_once:
                with self._engine.whole([trained]):
                    assert mine.shape == trained.shape, "build() made another model"
                    mine.copy_(trained)
        self._whole_once = True


def _wants_copy(engine: Frozen, choice: str) -> bool:
    ranks = engine.ranks
    needed = sum(_whole_numel(parameter) * parameter.element_size() for parameter in engine.module.parameters())
    free = _free_bytes(ranks.device, ranks.local_size)
    fits = free is None or needed <= FREE_SHARE * free
    wanted = choice == "once" or (choice == "auto" and not ranks.any(not fits))
    size = f"{needed / GIB:.1f} GiB per rank"
    if wanted:
        say(ranks, f"rollouts: ZeRO-3 weights gathered once per rollout ({size})")
    elif choice == "never":
        say(ranks, "rollouts: ZeRO-3 weights gathered for every token")
    else:
        say(ranks, f"rollouts: ZeRO-3 weights gathered for every token, as there is no memory for a copy ({size})")
    return wanted


def _whole_numel(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # a partitioned parameter is empty


def _free_bytes(device: torch.device, ranks_here: int) -> int | None:
    """Memory that this rank can take; ``None`` if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = free_memory()
    return None if available is None else available // ranks_here
