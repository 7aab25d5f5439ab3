"""Where rollouts get their weights from: the model under training, adapters merged; under ZeRO-3 a whole copy of it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policy.model import PolicyModel
from rlhf.core.memory import free_memory
from rlhf.engine.frozen import Frozen, ReplicatedModel
from rlhf.engine.portions import Portions
from rlhf.models.adapters import adapted_layers, mark_merged, merge_adapter, merged, merged_weight
from rlhf.train.stage import say

GIB = 2**30
FREE_SHARE = 0.5
"""Share of the free memory that a copy may take: caches, activations and optimizer states come on top."""


class RolloutWeights:
    """The model to sample from.

    Under ZeRO-3 every forward fetches all weights from the other ranks: for each token of a response. A whole
    copy on every rank is fetched once for a rollout instead, and sampled from without a word between the ranks.
    Adapters are merged into the weights for a rollout, where the merged ones fit beside the others: a layer with an
    adapter takes three products for each token, and several passes over what they give.
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
        self._layers = _mergeable(self.model.module)
        if self._layers and not sharded and not _fits_beside(engine, self._layers):
            say(
                engine.ranks,
                "rollouts: adapters stay apart, as there is no memory for merged weights beside the others",
            )
            self._layers = []

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Give the model the weights as training has left them, adapters merged, inside. Every rank must call it."""
        if self._copy is not None:
            self._refresh()
            yield
        elif self.synced:
            with self._merged_in_shares():
                yield
        else:
            with merged(self._layers):
                yield

    @torch.no_grad()
    def _refresh(self) -> None:
        """Take over what training has changed; what was merged needs the weights below anew."""
        assert self._copy is not None
        below = {layer.get_base_layer().weight for layer in self._layers}
        for layer in self._layers:
            mark_merged(layer, False)
        pairs = zip(self._copy.module.parameters(), self._engine.module.parameters(), strict=True)
        for mine, trained in pairs:
            if trained.requires_grad or mine in below or not self._whole_once:
                with self._engine.whole([trained]):
                    assert mine.shape == trained.shape, "build() made another model"
                    mine.copy_(trained)
        self._whole_once = True
        for layer in self._layers:
            merge_adapter(layer)
            mark_merged(layer, True)

    @contextlib.contextmanager
    def _merged_in_shares(self) -> Iterator[None]:
        """The same where every rank has a share of each weight: shares as they were are kept on the CPU."""
        weights = [layer.get_base_layer().weight for layer in self._layers]
        with Portions(self._engine, weights).put_back():
            try:
                for layer, weight in zip(self._layers, weights, strict=True):
                    adapter = [parameter for parameter in layer.parameters() if parameter is not weight]
                    with self._engine.whole(adapter), self._engine.whole([weight], modify=True), torch.no_grad():
                        weight.copy_(merged_weight(layer))
                    mark_merged(layer, True)
                yield
            finally:
                for layer in self._layers:
                    mark_merged(layer, False)


def _mergeable(module: nn.Module) -> list[Any]:
    """The layers with an adapter, but for those whose weight another module uses as it is."""
    adapters = module.adapters if isinstance(module, PolicyModel) else ()
    used: dict[nn.Parameter, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            used[parameter] = used.get(parameter, 0) + 1
    layers = [layer for adapter in adapters for layer in adapted_layers(adapter)]
    return [layer for layer in layers if used[layer.get_base_layer().weight] == 1]


def _fits_beside(engine: Frozen, layers: list[Any]) -> bool:
    """Whether merged weights take at most half of the free memory, on every rank."""
    weights = [layer.get_base_layer().weight for layer in layers]
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    free = _free_bytes(engine.ranks.device, engine.ranks.local_size)
    return not engine.ranks.any(free is not None and needed > FREE_SHARE * free)


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
