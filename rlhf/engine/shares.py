"""ZeRO-3 from the first byte on: the weights of a loaded model are shared out among the ranks one tensor at a time.

DeepSpeed would put the whole model on every device before it shares anything out. Here a rank holds its share and one
whole tensor. What the model was loaded with may lie in mapped files: such memory is only read, never written to.
"""

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn

from rlhf.engine.ranks import Ranks

Fill = Callable[[nn.Parameter], None]
"""Gives a parameter its values, just before it is shared out."""


def share_out(module: nn.Module, resolved: dict[str, Any], ranks: Ranks, fill: Fill | None = None) -> None:
    """Leave each rank its share of the parameters, in the precision of ``resolved``, and move the buffers.

    Args:
        module: the same on every rank; its parameters may be floats of any type. Every rank must call this.
        resolved: a DeepSpeed JSON of ZeRO-3.
        ranks: who shares.
        fill: called with one parameter after the other, for values that are not there yet.
    """
    dtype = _dtype(resolved)
    deepspeed.init_distributed(dist_init_required=False)
    shown = _OneByOne(module, dtype, ranks.device, fill)
    deepspeed.zero.Init(
        module=shown,
        config_dict_or_path=resolved,
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),  # it makes one where there is none yet
    )
    shown.end()  # DeepSpeed keeps it as long as the parameters
    for buffer in module.buffers():
        # What was read from files in half precision has the type of float32 weights.
        exact = dtype == torch.float32 and buffer.is_floating_point()
        buffer.data = buffer.data.to(ranks.device, dtype if exact else buffer.dtype)


class _OneByOne(nn.Module):
    """Shows the parameters of a module to DeepSpeed, each as a copy where and what it shall be, all at the same place.

    DeepSpeed takes the main rank's values for all: it would write them into the mapped file's pages, which every rank
    then had for itself. One place for all leaves no holes between the shares.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device, fill: Fill | None) -> None:
        super().__init__()
        self.module, self._fill = module, fill
        largest = max(parameter.numel() for parameter in module.parameters())
        self._place = torch.empty(largest, dtype=dtype, device=device)

    def end(self) -> None:
        """Let go of the place."""
        self._place, self._fill = torch.empty(0), None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.module.parameters(recurse):
            if self._fill is not None:
                self._fill(parameter)
            copy = self._place[: parameter.numel()].view(parameter.shape)
            parameter.data = copy.copy_(parameter.data)
            yield parameter


def _dtype(resolved: dict[str, Any]) -> torch.dtype:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for name, dtype in names.items() if resolved.get(name, {}).get("enabled")), torch.float32)
