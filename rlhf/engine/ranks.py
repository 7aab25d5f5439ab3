"""The processes of a run, and what they tell each other.

A run starts alike under ``python``, ``torchrun``, ``deepspeed`` and ``srun``: the launcher's
environment says which process this is.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from rlhf.core.errors import Unmet, UserError
from rlhf.core.ports import free_port

T = TypeVar("T")
_environment_before: dict[str, str | None] = {}


class RemoteError(UserError):
    """Another rank failed; its own message says why."""

    of_another_rank = True


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank, size and device of this process, with the collectives that stages need."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks of a tensor on the device of this rank."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """True on all ranks if ``flag`` is true on one of them."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate ``(b_r, ...)`` tensors of all ranks along rows, in rank order; ``b_r`` may differ.

        No gradient crosses ranks. Every rank must call it with the same trailing shape and dtype.
        """
        if self.world_size == 1:
            return rows.detach()
        counts = torch.zeros(self.world_size, dtype=torch.long, device=self.device)
        counts[self.rank] = len(rows)
        sizes = self.sum(counts).tolist()
        padded = rows.detach().new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows.detach()
        blocks = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(blocks, padded)
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    def gather_objects(self, value: T) -> list[T]:
        """Small picklable values of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T | None) -> T:
        """The main rank's ``value``, on every rank; what the others pass is not looked at."""
        box: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank; if it fails on one, all raise, the others naming the first that did."""
        fault: Exception | None = None
        try:
            result = action()
        except Exception as error:
            fault = error
        if not self.any(fault is not None):
            return result
        faults = self.gather_objects(None if fault is None else f"{type(fault).__name__}: {fault}")
        if fault is not None:
            raise fault
        rank, text = next((rank, text) for rank, text in enumerate(faults) if text is not None)
        raise RemoteError(f"rank {rank} failed: {text}")

    def main_first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on the first rank of each node, then on the others, which find its files."""
        if self.local_rank == 0:
            result = self.together(action)
            self.together(lambda: None)
            return result
        self.together(lambda: None)
        return self.together(action)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on the main rank only and give its (picklable) result to all; a failure is everybody's."""
        return self.broadcast_object(self.together(lambda: action() if self.is_main else None))


def start_ranks(timeout_seconds: float = 3600.0, rendezvous_seconds: float = 600.0) -> Ranks:
    """Find out which process this is and join the others.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` (torchrun, deepspeed), else the SLURM step's
    variables (srun with one task per process), else stands alone.

    Args:
        timeout_seconds: how long a rank waits for others in a collective.
        rendezvous_seconds: how long it waits here until all have come.
    Raises:
        Unmet: if the environment does not say where rank 0 listens, or the ranks do not meet.
    """
    environment = _launch_environment()
    local_rank = int(environment["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = _gpu(local_rank)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(environment["LOCAL_WORLD_SIZE"])))
    if not dist.is_initialized():
        _environment_before.update({name: os.environ.get(name) for name in environment})
        os.environ.update(environment)
        _join(device, timeout_seconds, rendezvous_seconds)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=int(environment["LOCAL_WORLD_SIZE"]),
        device=device,
    )


def single_rank() -> Ranks:
    """This process by itself, on its first GPU if there is one."""
    device = _gpu(0) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=device)


def _gpu(number: int) -> torch.device:
    """A GPU whose attention has kernels for any shape.

    cuDNN's, which torch comes to first on Hopper, builds a plan for each new shape: tens of milliseconds for each token
    of a response and each width of a batch.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", number)


def stop_ranks(*, together: bool = False) -> None:
    """Leave the process group, so that interpreters end without a warning, and restore the environment.

    What this process starts afterwards would otherwise take itself for its rank.

    Args:
        together: wait for the others first. All must do so, and none may have broken.
    """
    if dist.is_initialized():
        if together:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
        dist.destroy_process_group()
    while _environment_before:
        name, value = _environment_before.popitem()
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _join(device: torch.device, timeout_seconds: float, rendezvous_seconds: float) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=rendezvous_seconds)))
        dist.init_process_group(backend=backend, store=store, rank=rank, world_size=size, timeout=timeout)
        store.set_timeout(timeout)
    except dist.DistStoreError as error:
        raise Unmet(
            f"not all {os.environ['WORLD_SIZE']} ranks have come to {address}:{port} within {rendezvous_seconds:g} s "
            f"(engine.rendezvous_minutes): {str(error).splitlines()[0]}. See the logs of the others: is one still "
            "importing, ended, or behind a firewall?"
        ) from error
    except dist.DistNetworkError as error:
        unknown = _unresolved(address)
        if unknown:
            raise Unmet(
                f"the ranks cannot meet at {address}:{port}: {unknown}; MASTER_ADDR is to name the host of rank 0 as "
                "all others know it"
            ) from error
        raise Unmet(
            f"the ranks cannot meet at {address}:{port}: {str(error).splitlines()[0]}. If another run on this host has "
            f"the port, choose a free one: deepspeed --master_port {free_port()} ... (torchrun: --master-port)"
        ) from error


def _unresolved(address: str) -> str:
    """Why there is no such host; empty if there is."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return f"no such host is known here ({error.strerror})"
    return ""


def _launch_environment() -> dict[str, str]:
    found = os.environ
    if "RANK" in found and "WORLD_SIZE" in found:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        defaults = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": found.get("LOCAL_SIZE", found["WORLD_SIZE"])}
        told = {name: found.get(name, defaults.get(name, "")) for name in names}
        odd = [name for name, value in told.items() if not (value if name == "MASTER_ADDR" else value.isdecimal())]
        if odd:
            raise Unmet(
                f"RANK={told['RANK']} and WORLD_SIZE={told['WORLD_SIZE']} are set, and "
                f"{', '.join(f'{name}={told[name]!r}' for name in odd)}: expected an address and numbers, as launchers "
                "give them; to run one process alone, unset RANK and WORLD_SIZE"
            )
        return told
    tasks = int(found.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_PROCID" in found else 1
    if tasks == 1:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if "MASTER_ADDR" not in found:
        raise Unmet(
            f"srun started {tasks} tasks but MASTER_ADDR is not set, so they cannot find each other; "
            "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | sed -n 1p) and MASTER_PORT first"
        )
    return {
        "RANK": found["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": found["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(max(1, tasks // int(found.get("SLURM_STEP_NUM_NODES", "1")))),
        "MASTER_ADDR": found["MASTER_ADDR"],
        "MASTER_PORT": found.get("MASTER_PORT", "29500"),
    }
