"""What brings weights to the workers of one engine as a stream, without a folder."""

import re
import time
import urllib.parse
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from policy.generation.vllm.client import SILENT, EngineClient, EngineLost
from policy.generation.vllm.engine.margin_stream import Sender, address_towards

POLL_SECONDS = 0.02


class Link:
    """A group of this process and the workers of an engine, which is lost with it.

    Args:
        client: of the engine.
        kind: gloo or nccl.
        workers: of the engine.
        timeout_seconds: how long each end waits for the other.
    Raises:
        EngineLost: if the workers do not come.
        EngineRefused: if the engine cannot have such a group.
    """

    def __init__(self, client: EngineClient, kind: str, workers: int, timeout_seconds: float) -> None:
        self._client, self._timeout = client, timeout_seconds
        at = urllib.parse.urlsplit(client.url)
        host = address_towards(at.hostname or "", at.port or 80)
        self._threads = ThreadPoolExecutor(1)
        self._request: Future[Any] | None = None
        self._fault: EngineLost | None = None
        self._sender = Sender(kind, host, workers, timeout_seconds)
        self.device = self._sender.device
        """Where tensors are when they are sent."""
        joined, end = self._threads.submit(client.join, self._sender.meeting), time.monotonic() + timeout_seconds
        while not self._sender.all_are_here and not joined.done() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if self._sender.all_are_here:
            try:
                self._sender.open()
            except RuntimeError as error:
                raise EngineLost(_told(error)) from error
        joined.result()

    def listen(self, version: int) -> None:
        """Have the workers wait for weights of ``version``. A fault is kept for :meth:`finish`.

        Raises:
            EngineRefused: if the engine has newer weights.
        """
        lines, self._fault = self._client.receive(version), None
        try:
            self._result_of(self._threads.submit(next, lines, None))
        except EngineLost as fault:
            self._fault = fault
        self._request = self._threads.submit(lambda: [*lines])

    @property
    def listens(self) -> bool:
        """Whether the workers wait for more, as far as is known."""
        return self._request is not None and self._fault is None

    def send(self, name: str, tensor: Tensor) -> list[Any]:
        """Send a tensor off; what :meth:`wait` is to be called with. A fault is kept for :meth:`finish`."""
        assert self._request is not None, "listen() comes first"
        if self._request.done():  # its workers may live on for a while
            self._fault = EngineLost(str(self._request.exception() or "it stopped in the middle of the weights"))
            return []
        try:
            return self._sender.send(name, tensor)
        except RuntimeError as error:
            self._fault = EngineLost(_told(error))
            return []

    def wait(self, works: list[Any]) -> None:
        """Wait until a tensor has been sent."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._fault = EngineLost(_told(error))

    def finish(self) -> None:
        """Say that all was sent, and wait until the engine has loaded it.

        Raises:
            EngineLost: if it died or hangs, or has done so before.
        """
        request, self._request = self._request, None
        assert request is not None, "listen() comes first"
        if self._fault is None:
            try:
                self._sender.end()
            except RuntimeError as error:
                self._fault = EngineLost(_told(error))
        if self._fault is not None:
            self._client.close()
            raise self._fault
        self._result_of(request)

    def _result_of(self, request: Future[Any]) -> None:
        try:
            request.result(self._timeout)
        except TimeoutError as error:
            self._client.close()
            raise EngineLost(SILENT) from error


def _told(error: Exception) -> str:
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error)).partition(". ")[0]  # torch says first where in its source
    return SILENT if "imed out" in text else f"the stream of weights broke off: {text[:200]}"
