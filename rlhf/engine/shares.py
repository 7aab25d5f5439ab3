"""ZeRO-3 from the first byte on: the weights of a loaded model are shared out among the ranks one tensor at a time.

DeepSpeed would put the whole model on every device before it shares anything out. Here a rank holds its share and one
whole tensor. What the model was loaded with may lie in mapped files: such memory is only read, never written to.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import groups
from torch import nn

from rlhf.engine.ranks import Ranks

Fill = Callable[[nn.Parameter], None]
"""Gives a parameter its values, just before it is shared out."""


def share_out(
    module: nn.Module, resolved: dict[str, Any], ranks: Ranks, fill: Fill | None = None, *, as_they_are: bool = False
) -> None:
    """Leave each rank its share of the parameters, in the precision of ``resolved``, and move the buffers.

    Args:
        module: the same on every rank; its parameters may be floats of any type. Every rank must call this.
        resolved: a DeepSpeed JSON of ZeRO-3.
        ranks: who shares.
        fill: called with one parameter after the other, for values that are not there yet.
        as_they_are: whether each parameter keeps its type; see :func:`compute_in_float32`.
    """
    dtype = _dtype(resolved)
    deepspeed.init_distributed(dist_init_required=False)
    shown = _OneByOne(module, None if as_they_are else dtype, ranks.device, fill)
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

    def __init__(self, module: nn.Module, dtype: torch.dtype | None, device: torch.device, fill: Fill | None) -> None:
        super().__init__()
        self.module, self._dtype, self._fill = module, dtype, fill
        largest = max(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in module.parameters())
        self._place = torch.empty(largest, dtype=torch.uint8, device=device)

    def end(self) -> None:
        """Let go of the place."""
        self._place, self._fill = torch.empty(0), None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.module.parameters(recurse):
            if self._fill is not None:
                self._fill(parameter)
            dtype = self._dtype or parameter.dtype
            size = parameter.numel() * dtype.itemsize
            if size > len(self._place):  # ``fill`` gave it a wider type
                self._place = self._place.new_empty(size)
            parameter.data = self._place[:size].view(dtype).view(parameter.shape).copy_(parameter.data)
            yield parameter


def compute_in_float32(module: nn.Module) -> None:
    """Have a module whose parameters are shared out as they are compute in float32, with the same values.

    Parameters are made float32 when they have been gathered, and are let go as before: a rank never has more than one
    layer's in float32. Whoever asks for their type is told float32 at any time. Call it when DeepSpeed has the module.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point() and hasattr(parameter, "ds_tensor"):
            parameter.data = torch.empty(0, dtype=torch.float32, device=parameter.device)
            parameter.all_gather = _then_in_float32(parameter, parameter.all_gather)  # type: ignore[attr-defined]
    for part in module.modules():
        part.register_forward_pre_hook(_gathered_in_float32)


def _gathered_in_float32(part: nn.Module, inputs: Any) -> None:
    """Hooks of a module run in the order in which they came: DeepSpeed's, which gathers, is before this one."""
    for parameter in iter_params(part):
        _in_float32(parameter)


def _then_in_float32(parameter: nn.Parameter, gather: Callable[..., Any]) -> Callable[..., Any]:
    """Another module than its own may use it: DeepSpeed gathers it when it is first looked at there."""

    def gathered(param_list: Sequence[nn.Parameter] | None = None, **named: Any) -> Any:
        found = gather(param_list=param_list, **named)
        for each in param_list or [parameter]:
            _in_float32(each)
        return found

    return gathered


def _in_float32(parameter: nn.Parameter) -> None:
    if parameter.is_floating_point() and parameter.dtype != torch.float32:
        if parameter.is_cuda:  # it was gathered on a stream of its own, whose memory is given away when it is let go
            parameter.data.record_stream(torch.cuda.current_stream(parameter.device))
        parameter.data = parameter.data.float()


def _dtype(resolved: dict[str, Any]) -> torch.dtype:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for name, dtype in names.items() if resolved.get(name, {}).get("enabled")), torch.float32)
