"""A stream of weights from a trainer to the workers of one vLLM engine, over a process group that only they have.

Both ends import this file, which needs torch alone. No default process group is touched: vLLM's workers have one for
themselves, and so have the ranks of a trainer. NCCL and gloo differ in :func:`_group` and in where tensors are.
"""

import contextlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FRAME_BYTES = 1024
"""What comes before each tensor and says what it is; the last one says that there is no more."""
LISTENERS = 64


class Sender:
    """The trainer's end: rank 0 of a group with the workers of one engine.

    Args:
        kind: gloo or nccl.
        host: address of this machine that the engine reaches.
        workers: of the engine.
        timeout_seconds: how long each end waits for the other.
    """

    def __init__(self, kind: str, host: str, workers: int, timeout_seconds: float) -> None:
        with socket.socket(_family(host)) as listener:  # torch alone would listen at all addresses
            listener.bind((host, 0))
            listener.listen(LISTENERS)
            self.meeting: Mapping[str, Any] = {
                "kind": kind,
                "host": host,
                "port": listener.getsockname()[1],
                "size": workers + 1,
                "timeout_seconds": timeout_seconds,
            }
            """What a worker must know to come."""
            self._store = _store(self.meeting, descriptor=listener.detach())
        self.device = _device(kind)
        """Where tensors are when they are sent."""
        self._group: Any = None

    @property
    def all_are_here(self) -> bool:
        """Whether all workers have come."""
        return self._store.check([_sign(rank) for rank in range(1, self.meeting["size"])])

    def open(self) -> None:
        """Make the group, once all are here.

        Raises:
            RuntimeError: if a worker is gone.
        """
        self._group = _group(self.meeting, self._store, 0, self.meeting["host"])

    def send(self, name: str, tensor: Tensor) -> list[Any]:
        """Send a tensor off; what to wait for before it may change."""
        frame = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        works = [self._tell(frame)]
        if tensor.numel():
            works.append(self._group.broadcast(_bits(tensor.detach().to(self.device).contiguous()), 0))
        return works

    def end(self) -> None:
        """Say that all tensors were sent.

        Raises:
            RuntimeError: if a worker is gone.
        """
        self._tell({}).wait()

    def _tell(self, frame: Mapping[str, Any]) -> Any:
        text = json.dumps(frame).encode()
        if len(text) > FRAME_BYTES:
            raise ValueError(f"what there is to say of a tensor takes more than {FRAME_BYTES} bytes: {frame}")
        padded = torch.frombuffer(bytearray(text.ljust(FRAME_BYTES)), dtype=torch.uint8)
        return self._group.broadcast(padded.to(self.device), 0)


class Receiver:
    """A worker's end.

    Args:
        meeting: what the trainer's :class:`Sender` says.
        rank: of the worker in the group, from 1 on.
    """

    def __init__(self, meeting: Mapping[str, Any], rank: int) -> None:
        store = _store(meeting)
        store.set(_sign(rank), "here")
        self._device = _device(meeting["kind"])
        self._group = _group(meeting, store, rank, address_towards(meeting["host"], meeting["port"]))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one pass, each in memory of its own."""
        while True:
            frame = torch.empty(FRAME_BYTES, dtype=torch.uint8, device=self._device)
            self._group.broadcast(frame, 0).wait()
            told = json.loads(frame.cpu().numpy().tobytes())
            if not told:
                return
            tensor = torch.empty(told["shape"], dtype=getattr(torch, told["dtype"]), device=self._device)
            if math.prod(told["shape"]):
                self._group.broadcast(_bits(tensor), 0).wait()
            yield told["name"], tensor


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which it speaks to another one; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _store(meeting: Mapping[str, Any], descriptor: int | None = None) -> Any:
    """Where the members of a group find each other; the trainer listens."""
    return dist.TCPStore(
        meeting["host"],
        meeting["port"],
        is_master=descriptor is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=meeting["timeout_seconds"]),
        master_listen_fd=descriptor,
    )


def _group(meeting: Mapping[str, Any], store: Any, rank: int, address: str) -> Any:
    timeout = timedelta(seconds=meeting["timeout_seconds"])
    if meeting["kind"] == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        with _blocking_nccl():
            return dist.ProcessGroupNCCL(store, rank, meeting["size"], options)
    gloo: Any = dist.ProcessGroupGloo  # whose options torch does not declare
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    return gloo(store, rank, meeting["size"], options)


@contextlib.contextmanager
def _blocking_nccl() -> Iterator[None]:
    """Groups that are made inside raise where another member is lost; NCCL's watchdog would end the process."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _device(kind: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if kind == "nccl" else torch.device("cpu")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _sign(rank: int) -> str:
    return f"worker {rank}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
