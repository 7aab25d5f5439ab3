"""How many GPUs there are, found without torch in this process: a launcher has no use for its seconds and memory."""

import functools
import os
import subprocess
import sys
from pathlib import Path

DRIVERS = ("nvidiactl", "nvhost-gpu", "kfd", "dxg")
"""What a driver of CUDA or ROCm leaves in /dev; without any of them torch can see no GPU."""


def default_ranks() -> int:
    """All GPUs, or 2 processes on a CPU with 2 or more cores."""
    return visible_gpus() or min(2, len(os.sched_getaffinity(0)))


@functools.cache
def visible_gpus(devices: Path = Path("/dev")) -> int:
    """GPUs that torch sees; it is asked, in a process of its own, only where there can be one."""
    if not any((devices / name).exists() for name in DRIVERS):
        return 0
    question = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[-1])
