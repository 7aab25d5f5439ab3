"""What a run is planned for: nodes, devices, memory, rates."""

import os
import re
from dataclasses import dataclass

from launch.screen import gib
from rlhf.core.devices import PEAK_FLOPS
from rlhf.core.errors import ConfigError
from rlhf.core.memory import host_memory

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device by its data sheet."""

    memory: int
    """Bytes that a program sees."""
    flops: float
    """Dense bfloat16 operations a second."""
    bandwidth: float
    """Bytes a second from its memory."""


DEVICES = {
    "h100-80gb": Device(memory=81_559 * 2**20, flops=PEAK_FLOPS["H100"], bandwidth=3.35e12),
    "h200": Device(memory=143_771 * 2**20, flops=PEAK_FLOPS["H200"], bandwidth=4.8e12),
    "a100-80gb": Device(memory=81_920 * 2**20, flops=PEAK_FLOPS["A100"], bandwidth=2.0e12),
    "a100-40gb": Device(memory=40_960 * 2**20, flops=PEAK_FLOPS["A100"], bandwidth=1.555e12),
    "l40s": Device(memory=46_068 * 2**20, flops=PEAK_FLOPS["L40S"], bandwidth=0.864e12),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The shape of the machine."""

    nodes: int
    devices_per_node: int
    device: str
    """Its name, in words."""
    device_memory: int
    """Memory in bytes of one device; on CPUs, of a node."""
    host_memory: int | None
    """Host memory of a node in bytes; ``None`` if nobody said."""
    flops: float | None
    """Peak rate of one device, or ``None``: no times are given."""
    utilization: float
    """Share of the peak that training reaches."""
    bandwidth: float | None = None
    on_cpu: bool = False

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def rate(self) -> float | None:
        """Operations a second of one device."""
        return None if self.flops is None else self.flops * self.utilization


def parse_bytes(text: str) -> int:
    """``80GiB``, ``80g`` or ``640000MB`` as bytes.

    Raises:
        ValueError: for anything else, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"{text}: expected a size such as 80GiB or 512GB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def cluster_of(
    *,
    nodes: int = 1,
    devices_per_node: int | None = None,
    device: str | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    flops: float | None = None,
    utilization: float = 1.0,
) -> Cluster:
    """The cluster that a command's options describe; what they leave out is asked of this machine.

    Raises:
        ConfigError: for a device that nobody knows.
    """
    if device not in (None, "cpu", *DEVICES):
        raise ConfigError(f"--device {device}: expected one of {', '.join(DEVICES)}, cpu; or give --device-memory")
    listed = DEVICES.get(device or "")
    here = _gpus_here() if device is None and device_memory is None else None
    memory, count, name = device_memory, 8, device or ""
    if listed is not None:
        memory = memory or listed.memory
    elif here is not None:
        name, memory, count = here
        listed = next((DEVICES[key] for key in DEVICES if key.partition("-")[0] in name.lower()), None)
        host_memory = host_memory or _host_bytes()
    elif memory is not None and device is None:
        name = f"device of {gib(memory)}"
    else:
        name, count = "cpu", min(2, len(os.sched_getaffinity(0)))
        memory = host_memory = host_memory or memory or _host_bytes()
        if memory is None:
            raise ConfigError("the memory of this machine is not known; give --host-memory, for example 64GiB")
    return Cluster(
        nodes=nodes,
        devices_per_node=devices_per_node or count,
        device=name,
        device_memory=memory,
        host_memory=host_memory,
        flops=flops or (None if listed is None else listed.flops),
        utilization=utilization,
        bandwidth=None if listed is None else listed.bandwidth,
        on_cpu=name == "cpu",
    )


def _host_bytes() -> int | None:
    """All memory that this machine, or the control group around this process, has to give."""
    found = host_memory()
    return None if found is None else found.total


def _gpus_here() -> tuple[str, int, int] | None:
    """Name, memory and number of the GPUs of this machine, if it has some."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1], torch.cuda.device_count()
