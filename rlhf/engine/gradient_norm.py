"""The norm of the gradient under ZeRO-1 and ZeRO-2, by few kernels.

DeepSpeed looks at the smallest and the largest number of each gradient by itself, and then at its norm in a copy in
double precision: some two thousand kernels in a step of a model of 150 tensors, during which a GPU waits for Python.
The norm alone tells whether a number is not finite, and DeepSpeed drops such a step by its norm as well.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def take_one_norm(optimizer: Any) -> None:
    """Have an optimizer of ZeRO-1 or ZeRO-2 ask for the norm of all gradients at once, and for nothing else.

    Any other stays as it is, and so does one whose gradients are offloaded, which are looked at on their way, or that
    is told to compute no norm.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.has_moe_layers:
        return
    if optimizer.cpu_offload or not optimizer.compute_grad_norm:
        return
    optimizer.check_overflow = lambda **_: None
    optimizer.scaled_global_norm = functools.partial(_norm, optimizer)


def _norm(optimizer: DeepSpeedZeroOptimizer) -> Tensor:
    """The Euclidean norm of the averaged gradients of all ranks; infinite where one of their numbers is not finite.

    It is that of DeepSpeed bit for bit: so it is added up group by group.
    """
    norms = []
    for place in range(len(optimizer.bit16_groups)):
        gradients = [each for each in optimizer.averaged_gradients[place] if not getattr(each, "_zero_padding", False)]
        squares = torch.zeros((), device=optimizer.device)
        if gradients:  # a rank may have nothing but padding
            squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum().float()
        dist.all_reduce(squares, group=optimizer.dp_process_group)
        norms.append(squares.sqrt())
    return combine_grad_norm_groups(norms)
