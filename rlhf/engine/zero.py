"""DeepSpeed, and it alone: ZeRO 0 to 3 behind the engine protocol."""

import contextlib
import copy
import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import numa
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf.core.errors import CheckpointError
from rlhf.engine.api import StepInfo
from rlhf.engine.deepspeed_ops import await_builds, optimizer_is_on_nvme, require_ops
from rlhf.engine.gradient_norm import take_one_norm
from rlhf.engine.optimizers import build_optimizer, build_schedule, follow_schedule, move_schedule
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.engine.shares import share_out
from rlhf.engine.universal import load_on_other_ranks, ranks_written_on, remove_converted

TAG = "deepspeed"
_ENGINES = itertools.count()

log = logging.getLogger(__name__)


class ZeroEngine:
    """The engine in DeepSpeed; see :class:`rlhf.engine.api.Engine`.

    DeepSpeed averages gradients over ranks and knows a fixed number of micro-batches; a global batch here
    has as many as its tokens need. So the loss is scaled by the ranks, and the boundary is set by hand.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ranks: Ranks,
        optimizer: OptimizerConfig,
        total_steps: int,
        deepspeed_config: dict[str, Any],
    ) -> None:
        _quiet()
        require_ops(deepspeed_config)
        ranks.main_first(lambda: await_builds(deepspeed_config))
        self.ranks = ranks
        self.settings = deepspeed_config
        zero = deepspeed_config.get("zero_optimization", {})
        self.stage = int(zero.get("stage", 0))
        self.shared_out = self.stage == 3
        self._max_grad_norm = optimizer.max_grad_norm
        config = _with_own_nvme_folder(deepspeed_config)
        if self.shared_out:
            share_out(module, config, ranks)
        adam, name = _build_adam(module, optimizer, offload=_offloads(zero), on_cpu=ranks.device.type == "cpu")
        self._engine, self._optimizer, _, self._schedule = deepspeed.initialize(
            model=module,
            optimizer=adam,
            lr_scheduler=build_schedule(adam, optimizer, total_steps),
            config=config,
            dist_init_required=False,
        )
        take_one_norm(self._optimizer)
        self.module = self._engine.module.train()
        self._has_frozen = any(not p.requires_grad for p in self.module.parameters())
        self._float16 = bool(deepspeed_config.get("fp16", {}).get("enabled", False))
        self._bad = torch.zeros((), dtype=torch.bool, device=ranks.device)
        precision = next(self.module.parameters()).dtype
        self.description = (
            f"DeepSpeed ZeRO-{self.stage}, {str(precision).removeprefix('torch.')}, {name}, {ranks.world_size} rank(s)"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        finite = torch.isfinite(loss.detach())
        self._bad = self._bad | ~finite
        self._engine.set_gradient_accumulation_boundary(last)
        # A loss of minus infinity can still have finite gradients; make sure that the step is dropped.
        scale = torch.where(finite, self.ranks.world_size, math.nan)
        self._engine.backward(loss * scale)

    def step(self) -> StepInfo:
        rate = self._schedule.get_last_lr()[0]
        bad, self._bad = self._bad, torch.zeros_like(self._bad)
        if isinstance(self._optimizer, torch.optim.Optimizer) and not hasattr(self._optimizer, "overflow"):
            return self._step_without_zero(rate, bad)
        self._engine.step()
        overflow = bool(getattr(self._optimizer, "overflow", False))
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        applied = not overflow and math.isfinite(norm)
        return StepInfo(applied, norm, rate, self._float16 and overflow and not self.ranks.any(bool(bad)))

    def _step_without_zero(self, rate: float, bad: Tensor) -> StepInfo:
        """ZeRO-0 in float32 hands back the bare optimizer, which would apply any gradient."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        length = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.ranks.device)
        norm, lost = torch.stack([length, self.ranks.sum(bad.to(length.dtype))]).tolist()
        if lost or not math.isfinite(norm):
            self._engine.zero_grad()
            return StepInfo(False, norm, rate)
        self._engine.step()
        return StepInfo(True, norm, rate)

    def move_schedule(self, steps: int) -> None:
        move_schedule(self._schedule, steps)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=self._has_frozen
        )

    def load(self, folder: Path) -> None:
        if optimizer_is_on_nvme(self.settings):
            raise CheckpointError(
                f"{folder}: DeepSpeed does not read optimizer states back from NVMe, so this run cannot go on from a "
                "checkpoint; take a configuration without NVMe (zero3_offload), or start anew in another output folder"
            )
        if self.stage and ranks_written_on(folder / TAG) not in (0, self.ranks.world_size):
            load_on_other_ranks(self._engine, folder, TAG, self.ranks)
        else:
            remove_converted(folder, self.ranks)
            found, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self._has_frozen)
            if found is None:
                raise CheckpointError(f"{folder}: DeepSpeed found no state with tag {TAG!r} in it")
        follow_schedule(self._schedule)

    def release(self) -> None:
        self._engine.empty_partition_cache()

    def full_state_dict(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        kept = self.module.state_dict().keys()
        for name, tensor in tensors:
            with self.whole([tensor]):
                if self.ranks.is_main and name in kept:
                    values[name] = tensor.detach().cpu().clone()
        return values

    def whole(self, tensors: Sequence[Tensor], *, modify: bool = False) -> contextlib.AbstractContextManager:
        return _gathered(tensors, modify)


class ShardedModel:
    """A frozen model in shards: ZeRO-3 holds a share of the weights on each rank, or on the hosts.

    See :class:`rlhf.engine.frozen.Frozen`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ranks: Ranks,
        deepspeed_config: dict[str, Any],
        fill: Callable[[nn.Parameter], None] | None = None,
        as_they_are: bool = False,
    ) -> None:
        _quiet()
        self.ranks = ranks
        module.requires_grad_(False).eval()
        require_ops(deepspeed_config)
        config = _with_own_nvme_folder(deepspeed_config)
        share_out(module, config, ranks, fill, as_they_are=as_they_are)
        self._engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
        self.module = self._engine.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def whole(self, tensors: Sequence[Tensor], *, modify: bool = False) -> contextlib.AbstractContextManager:
        return _gathered(tensors, modify)


def _gathered(tensors: Sequence[Tensor], modify: bool) -> contextlib.AbstractContextManager:
    """Parameters that ZeRO-3 has partitioned, whole on every rank; others are so already."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    return GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def _with_own_nvme_folder(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with a folder below its nvme_path: two engines of a process would write over each other's states."""
    config, number = copy.deepcopy(config), next(_ENGINES)
    for key in ("offload_optimizer", "offload_param"):
        section = config.get("zero_optimization", {}).get(key) or {}
        if section.get("device") == "nvme":
            section["nvme_path"] = str(Path(section["nvme_path"]) / f"engine{number}")
    return config


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU ZeRO-3 would start numactl, some hundred times a step, to count the cores.
    if not hasattr(numa.get_numa_cores, "cache_info"):
        numa.get_numa_cores = functools.cache(numa.get_numa_cores)
    # On a CPU DeepSpeed would compile, for minutes, a shared-memory all-reduce; gloo does without.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def _offloads(zero: dict[str, Any]) -> bool:
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def _build_adam(module: nn.Module, config: OptimizerConfig, *, offload: bool, on_cpu: bool) -> tuple[Optimizer, str]:
    """The AdamW that fits, with its name: DeepSpeed's CPU op for offloaded states where it builds, else torch's."""
    if offload:
        try:
            return build_optimizer(module, config, DeepSpeedCPUAdam, adamw_mode=True), "DeepSpeed CPU AdamW"
        except Exception as error:  # building the op needs ninja, a C++ compiler and the Python headers
            log.warning("DeepSpeed's CPU Adam op does not build here (%s); torch AdamW takes its place", error)
            return build_optimizer(module, config, foreach=False), "torch AdamW (CPU Adam op not built)"
    if on_cpu or torch.cuda.is_available():
        return build_optimizer(module, config, fused=True), "fused torch AdamW"
    return build_optimizer(module, config), "torch AdamW"
