"""Weights that the ranks share (ZeRO-3) on their way to files: one after the other is whole, is written, and let go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf.engine.api import Engine
from rlhf.engine.frozen import Frozen, share_in_float32
from rlhf.models import shards
from rlhf.models.adapters import adapted_layers, merge_adapter, take_off
from rlhf.models.shards import ModelWriter


class Wrapped(Protocol):
    """A model around one of Transformers, which may have adapters."""

    hf: PreTrainedModel

    @property
    def adapters(self) -> Sequence[PeftModel]: ...


class TrainedWeights:
    """The weights of an engine, for an untrained copy of its model. Every rank must make the same calls.

    Args:
        engine: shares them out.
        model: the copy, on every rank, with adapters apart.
    """

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        self._engine, self._names = engine, {parameter: name for name, parameter in model.named_parameters()}
        self._trained = dict(engine.module.named_parameters())

    def fill(self, *parameters: nn.Parameter) -> None:
        """Give parameters of the copy the values, and the type, that they have in the engine, on the CPU."""
        for parameter in parameters:
            trained = self._trained[self._names[parameter]]
            with self._engine.whole([trained]):
                parameter.data = trained.detach().to("cpu", copy=True)


def write_whole(engine: Engine, model: Any, folder: Path, *, ask: bool) -> Frozen | None:
    """Write the plain Transformers model inside ``model``, adapters merged into its weights. Every rank must call it.

    Args:
        engine: has the weights.
        model: an untrained copy (:class:`Wrapped`), on every rank; it loses its adapters and its weights.
        folder: where the main rank writes to.
        ask: whether to share the same weights out in float32, to be asked.
    Returns:
        The model to be asked.
    """
    ranks, hf, weights = engine.ranks, model.hf, TrainedWeights(engine, model)
    layers = {layer.get_base_layer().weight: layer for adapter in model.adapters for layer in adapted_layers(adapter)}
    for adapter in model.adapters:
        take_off(adapter)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    writer = ranks.together(lambda: ModelWriter(hf, folder, shards.fitting_bytes()) if ranks.is_main else None)
    faults: list[Exception] = []

    def write(parameter: nn.Parameter) -> None:
        assert writer is not None
        for name in names[parameter]:
            if name in writer.names:
                writer.add(name, parameter.data)

    def fill(parameter: nn.Parameter) -> None:
        layer = layers.get(parameter)
        adapter = [] if layer is None else [each for each in layer.parameters() if each is not parameter]
        weights.fill(parameter, *(each for each in adapter if each not in names))
        if parameter not in names:  # of the wrapper, not of the model that is written
            return
        if layer is not None:
            merge_adapter(layer)
            for each in adapter:
                each.data = torch.empty(0) if each not in names else each.data
        if writer is not None and not faults:
            try:
                write(parameter)
            except Exception as error:  # the others are not left alone: they wait for the next tensor
                faults.append(error)

    asked = None
    if ask:
        asked = share_in_float32(model, ranks=ranks, hidden_size=hf.config.hidden_size, fill=fill)
    else:
        for parameter in model.parameters():
            fill(parameter)
            parameter.data = torch.empty(0)

    def finish() -> None:
        if faults:
            raise faults[0]
        if writer is not None:
            for name in sorted(writer.names):
                writer.add(name, engine.module.get_buffer(f"hf.{name}").detach().cpu())
            writer.close()

    ranks.together(finish)
    return asked
