"""Bytes of weights, gradients and optimizer states on one rank, by ZeRO stage and offload, as DeepSpeed allocates them.

With P all and T trained parameters, N ranks, s bytes a number of the run's precision:

    stage   weights        master        moments   gradients            in the optimizer's step, on top
    0       s P            4 T if s = 2  8 T       s T                  N > 1: s T (all-reduce); s = 2: 4 T
    1       s P            4 T / N       8 T / N   s T                  s T / N (+ 4 T / N if s = 2)
    2       s P            4 T / N       8 T / N   4 T / N              s = 4: 4 T / N
    3       s P / N        4 T / N       8 T / N   4 T / N              4 T / N

Gradients of stages 2 and 3 are those that are added up in float32, the default; in bfloat16 (or stage 2 offloaded) they
are s T / N, and the step makes a float32 copy. Stages 1 to 3 keep a master copy of their share even in float32. The
numbers were read off deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and fp16/unfused_optimizer.py, and checked on
live tensors.

References:
    Rajbhandari et al. (2019), ZeRO, arXiv:1910.02054, section 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Place = Literal["device", "host", "nvme"]

MASTER, MOMENTS = 4, 8
"""Bytes a parameter: the float32 copy, and AdamW's two moments."""
ALL_REDUCE_ELEMENTS = 500_000_000
"""Elements that DeepSpeed's stage 0 flattens into one tensor to reduce them."""
SWAPPED_GRADIENTS = 4
"""Bytes a parameter: DeepSpeed swaps float32 gradients to NVMe beside the states (16 in all were measured)."""
NVME_BUFFERS = 5
"""Host buffers of a sub-group, float32, while states are swapped (DeepSpeed's default buffer_count)."""


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What of a DeepSpeed JSON decides on memory."""

    stage: int = 0
    optimizer_place: Place = "device"
    weights_place: Place = "device"
    bucket: int = 0
    """Elements of a reduction bucket."""
    buckets: int = 1
    """Number of reduction buckets: 2 with overlap_comm."""
    prefetch: int = 0
    """Elements of stage 3's prefetch bucket."""
    persistent: int = 0
    """Elements of the largest parameter that stage 3 keeps whole."""
    max_live: int = 0
    """Elements that stage 3 keeps gathered at most."""
    sub_group: int = 0
    """Elements that stage 3 updates at once."""
    float32_gradients: bool = False
    """Gradients of micro-batches are added up in float32, whatever the precision of the weights."""
    secondary_ranks: int = 1
    """zero_hpz_partition_size: ranks of a node that share a second copy of the weights; 1: none."""
    local: bool = False
    """No DeepSpeed at all: plain torch."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Parameters of one model."""

    total: int
    trainable: int
    largest: int
    """Parameters of the largest single tensor."""
    largest_trainable: int
    vectors: int = 0
    """Parameters of tensors that stage 3 keeps whole."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes on one rank. ``device`` and ``host`` hold what is there all the time, by name."""

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    nvme: int = 0
    moments: Mapping[str, int] = field(default_factory=dict)
    """The optimizer's moments on the device: from the end of the first step on."""
    gathered: int = 0
    """Whole weights that stage 3 has at hand in a forward or backward pass."""
    buckets: int = 0
    """Reduction buckets, in the backward pass."""
    gradients_before: int = 0
    """Gradients on the device when the last backward pass of a step begins."""
    gradients_after: int = 0
    """Gradients on the device when it ends."""
    gradients_stay: bool = False
    """Whether those are there from the start of the run to its end: stage 3 has one flat tensor for them."""
    step: int = 0
    """Temporary tensors while the optimizer steps, on top of gradients."""


def zero_settings(resolved: Mapping[str, Any]) -> ZeroSettings:
    """Read a resolved DeepSpeed JSON; an empty one is plain torch."""
    if not resolved:
        return ZeroSettings(local=True)
    zero = resolved.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    places: dict[str, Place] = {"cpu": "host", "nvme": "nvme"}

    def place(name: str) -> Place:
        return places.get((zero.get(name) or {}).get("device", "none"), "device")

    return ZeroSettings(
        stage=stage,
        optimizer_place=place("offload_optimizer"),
        weights_place=place("offload_param"),
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        buckets=2 if zero.get("overlap_comm", stage == 3) and stage < 3 else 1,
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        float32_gradients=resolved.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        secondary_ranks=int(zero.get("zero_hpz_partition_size", 1)),
    )


def trained_states(
    zero: ZeroSettings, numbers: Numbers, *, size: int, ranks: int, micro_batches: int, on_cpu: bool
) -> States:
    """States of a model under training.

    Args:
        zero: the DeepSpeed settings.
        numbers: parameters of the model.
        size: bytes of a number of the run's precision.
        ranks: data-parallel ranks.
        micro_batches: backward passes of a step; from the second on, gradients of the earlier ones are there.
        on_cpu: memory that is allocated and never touched does not count there.
    """
    if zero.stage == 0:
        return _replicated(zero, numbers, size=size, ranks=ranks, micro_batches=micro_batches)
    if zero.stage < 3:
        return _split_optimizer(zero, numbers, size=size, ranks=ranks, micro_batches=micro_batches, on_cpu=on_cpu)
    return _split_weights(zero, numbers, size=size, ranks=ranks, on_cpu=on_cpu)


def frozen_states(zero: ZeroSettings | None, numbers: Numbers, *, size: int, ranks: int) -> States:
    """States of a frozen model: whole, ``s P``, if ``zero`` is ``None``; else ``s P / N`` and what is gathered."""
    if zero is None:
        return States(device={"weights": size * numbers.total})
    share = size * _share(numbers.total, ranks)
    gathered = size * min(numbers.total, zero.max_live + zero.prefetch)
    if zero.weights_place == "device":
        return States(device={"weights": share}, gathered=gathered)
    on_nvme = zero.weights_place == "nvme"
    return States(
        device={}, host={} if on_nvme else {"weights": share}, nvme=share if on_nvme else 0, gathered=gathered
    )


def _replicated(zero: ZeroSettings, numbers: Numbers, *, size: int, ranks: int, micro_batches: int) -> States:
    trained = numbers.trainable
    device = {"weights": size * numbers.total}
    step = 0
    if size == 2:
        device["master weights"] = MASTER * trained
        step += MASTER * trained
    if ranks > 1:
        step += size * (numbers.largest_trainable if zero.local else min(trained, ALL_REDUCE_ELEMENTS))
    before = size * trained if micro_batches > 1 else 0
    return States(
        device=device,
        moments={"optimizer states": MOMENTS * trained},
        gradients_before=before,
        gradients_after=size * trained + (size * numbers.largest_trainable if before else 0),
        step=step,
    )


def _split_optimizer(
    zero: ZeroSettings, numbers: Numbers, *, size: int, ranks: int, micro_batches: int, on_cpu: bool
) -> States:
    """Stages 1 and 2: weights are whole on every rank, the optimizer's states are shared out."""
    trained, share = numbers.trainable, _share(numbers.trainable, ranks)
    # Only stage 2 shares gradients out as well; stage 1 holds all of them until the step.
    split = zero.stage == 2
    # DeepSpeed allocates buckets at full size, however small the model is; a CPU never backs pages that stay untouched.
    bucket = zero.bucket * zero.buckets
    buckets = size * (min(bucket, trained) if on_cpu else bucket)
    if ranks > 1:
        buckets += size * min(zero.bucket, trained)  # flattened again to be reduced
    held = size * (share if split else trained)
    # Stage 2 adds up micro-batches in a second tensor, beside the share that the last one reduces into.
    added_up = held * (2 if split and micro_batches > 1 else 1)
    # The step flattens this rank's gradients, and in half precision makes a float32 copy for the master weights.
    step = size * share + (MASTER * share if size == 2 else 0)
    if zero.float32_gradients and size == 2:  # one flat tensor that all micro-batches are added to, and the step takes
        held = added_up = MASTER * share
        step = 0
    device = {"weights": size * numbers.total}
    if zero.optimizer_place == "device":
        return States(
            device=device | {"master weights": MASTER * share},
            moments={"optimizer states": MOMENTS * share},
            buckets=buckets,
            gradients_before=held if micro_batches > 1 else 0,
            gradients_after=added_up,
            step=step,
        )
    # Offloaded gradients leave the device as soon as they are reduced, and are added up on the host.
    accumulated = size * share if micro_batches > 1 else 0
    host, nvme = _offloaded(zero, share)
    host |= {"gradients": MASTER * share + accumulated, "copy of the weights": size * share}
    return States(
        device=device,
        host=host,
        nvme=nvme,
        buckets=buckets + size * 2 * numbers.largest_trainable,
        gradients_before=0,
        gradients_after=size * numbers.largest_trainable,
    )


def _split_weights(zero: ZeroSettings, numbers: Numbers, *, size: int, ranks: int, on_cpu: bool) -> States:
    share, trained = _share(numbers.total, ranks), _share(numbers.trainable, ranks)
    device: dict[str, int] = {"kept whole": size * numbers.vectors}
    host: dict[str, int] = {}
    nvme = 0
    weights = size * share
    if zero.secondary_ranks > 1:
        device["second copy in the node"] = size * _share(numbers.total, zero.secondary_ranks)
    if zero.weights_place == "device":
        device["weights"] = weights
    elif zero.weights_place == "host":
        host["weights"] = weights
    else:
        nvme += weights
    gathered = size * min(numbers.total, zero.max_live + zero.prefetch)
    gradient = MASTER if zero.float32_gradients else size
    # The gradient of a tensor that no bucket holds, its flat copy, and what comes of reducing that.
    buckets = size * (zero.bucket + 3 * numbers.largest_trainable)
    if zero.optimizer_place == "device":
        return States(
            device=device | {"master weights": MASTER * trained},
            moments={"optimizer states": MOMENTS * trained},
            gathered=gathered,
            buckets=buckets,
            gradients_before=gradient * trained,
            gradients_after=gradient * trained,
            gradients_stay=True,
            step=gradient * trained + (MASTER * trained if gradient == 2 else 0),
            host=host,
            nvme=nvme,
        )
    offloaded, swapped = _offloaded(zero, trained)
    host |= offloaded | {"gradients": (MASTER + gradient) * trained}
    return States(device=device, host=host, nvme=nvme + swapped, gathered=gathered, buckets=buckets)


def _offloaded(zero: ZeroSettings, share: int) -> tuple[dict[str, int], int]:
    """Host and NVMe bytes of master weights and moments, on NVMe of gradients as well."""
    if zero.optimizer_place == "host":
        return {"master weights": MASTER * share, "optimizer states": MOMENTS * share}, 0
    group = min(share, zero.sub_group or share)
    return {"swap buffers": NVME_BUFFERS * MASTER * group}, (MASTER + MOMENTS + SWAPPED_GRADIENTS) * share


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)
