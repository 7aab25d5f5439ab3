"""``--module rlhf.engine.bandwidth FILE`` under any launcher: how fast, and how rightly, the ranks add up a tensor.

The main rank writes FILE.
"""

import socket
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.engine.ranks import Ranks, start_ranks, stop_ranks

MEBIBYTES = {"cuda": 256, "cpu": 32}
REPEATS = 5
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """All-reduce of a float32 tensor over all ranks."""

    ranks: int
    nodes: int
    backend: str
    bytes: int
    """Size of the tensor on each rank."""
    seconds: float
    """Median of the repeats, on the slowest rank."""
    bus_gb_per_second: float
    """``bytes / seconds * 2 (n - 1) / n``, in 1e9 bytes: what crosses each rank's link, comparable between numbers of
    ranks (nccl-tests' busbw)."""
    latency_seconds: float
    """Median time of the all-reduce of a single number, on the slowest rank."""
    correct: bool
    """Whether every rank holds the right sum."""


def measure(ranks: Ranks, mebibytes: int) -> Bandwidth:
    """Every rank must call it, with the same size."""
    tensor = torch.full((mebibytes * 2**18,), float(ranks.rank + 1), device=ranks.device)
    seconds = _slowest(ranks, _median_seconds(ranks, tensor.clone()))
    latency = _slowest(ranks, _median_seconds(ranks, torch.ones(1, device=ranks.device)))
    total = ranks.sum(tensor)
    right = bool((total == ranks.world_size * (ranks.world_size + 1) / 2).all())
    size = tensor.numel() * tensor.element_size()
    return Bandwidth(
        ranks=ranks.world_size,
        nodes=len(set(ranks.gather_objects(socket.gethostname()))),
        backend=dist.get_backend(),
        bytes=size,
        seconds=seconds,
        bus_gb_per_second=size / seconds * 2 * (ranks.world_size - 1) / ranks.world_size / 1e9,
        latency_seconds=latency,
        correct=not ranks.any(not right),
    )


def _median_seconds(ranks: Ranks, tensor: torch.Tensor) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first sets up connections
        ranks.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _slowest(ranks: Ranks, seconds: float) -> float:
    return max(ranks.gather_objects(seconds))


def main() -> int:
    try:
        ranks = start_ranks(timeout_seconds=TIMEOUT_SECONDS)
        found = measure(ranks, MEBIBYTES[ranks.device.type])
        if ranks.is_main:
            write_json(Path(sys.argv[-1]), asdict(found))
        ranks.barrier()
        return 0
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        stop_ranks()


if __name__ == "__main__":
    sys.exit(main())
