"""What the trainer says to one engine, over HTTP."""

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

CONNECT_SECONDS = 10.0
SILENT = "it gives no sign of life"

WireRow = tuple[list[int], int]
"""Tokens of a prompt and the seed of the response."""


class EngineLost(Exception):
    """An engine died, hangs or talks nonsense. Another one can take its place."""


class EngineRefused(Exception):
    """An engine does not do what it was asked, and another one would not either."""


@dataclass(frozen=True)
class Weights:
    """The weights of one version."""

    folder: Path | None
    """Where engines load them from; ``None`` if they were sent as a stream."""
    version: int
    sums: Mapping[str, str]
    """The checksum of each layer; see :func:`policy.generation.vllm.engine.margin_engine.weight_sums`."""


class EngineClient:
    """Requests to the engine at ``url``, with the secret that both know."""

    def __init__(self, url: str, token: str, *, timeout_seconds: float) -> None:
        self.url = url.rstrip("/")
        self._connection: socket.socket | None = None
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds)),
            trust_env=False,
        )

    def state(self) -> dict[str, Any]:
        """Version and checksums of its weights, and what it can do."""
        return self._json("GET", "/state")

    def update(self, weights: Weights) -> dict[str, Any]:
        """Load these weights, or take those that were sent; what it has then."""
        folder = None if weights.folder is None else str(weights.folder.resolve())
        return self._json("POST", "/update", {"folder": folder, "version": weights.version, "sums": dict(weights.sums)})

    def join(self, meeting: Mapping[str, Any]) -> None:
        """Have its workers come to where weights are sent; see :class:`policy.generation.vllm.link.Link`."""
        self._json("POST", "/join", meeting)

    def receive(self, version: int) -> Iterator[dict[str, Any]]:
        """Have its workers wait for weights of ``version``: a line when they do, and one when they have all. That may
        take any time: :meth:`close` ends it.

        Raises:
            EngineLost: if the engine dies.
            EngineRefused: if it has newer weights.
        """
        patient = httpx.Timeout(None, connect=self._http.timeout.connect)
        return self._lines("/receive", {"version": version}, patient)

    def sleep(self) -> None:
        """Give its device memory back until the next request, where it can."""
        self._json("POST", "/sleep")

    def generate(self, version: int, settings: Mapping[str, Any], rows: Sequence[WireRow]) -> Iterator[dict[str, Any]]:
        """Lines about responses by weights of ``version``, as they are done; the last one says that all are.

        Raises:
            EngineLost: if the engine dies, or says nothing for the time of the timeout.
            EngineRefused: if it has weights of another version, or cannot take a prompt.
        """
        return self._lines("/generate", {"version": version, "settings": dict(settings), "rows": rows})

    def _lines(self, path: str, asked: Any, timeout: httpx.Timeout | None = None) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream(
                "POST", f"{self.url}{path}", json=asked, timeout=timeout or self._http.timeout, extensions=self._noted
            ) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise EngineRefused(_error_of(answer.read()))
                for line in answer.iter_lines():
                    yield json.loads(line)
        except (httpx.HTTPError, ValueError) as error:
            raise EngineLost(_told(error)) from error

    def close(self) -> None:
        """End the request that waits for an answer, if one does, in whatever thread."""
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._connection.shutdown(socket.SHUT_RDWR)

    @property
    def _noted(self) -> dict[str, Any]:
        """What has httpx tell of a new connection: each request has its own."""

        def trace(event: str, info: Mapping[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                self._connection = info["return_value"].get_extra_info("socket")

        return {"trace": trace}

    def _json(self, method: str, path: str, asked: Any = None) -> dict[str, Any]:
        try:
            answer = self._http.request(method, f"{self.url}{path}", json=asked, extensions=self._noted)
            if answer.status_code != httpx.codes.OK:
                raise EngineRefused(_error_of(answer.content))
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineLost(_told(error)) from error


def _error_of(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError) as error:
        raise EngineLost(f"it answers {content[:100]!r}, which no engine of this toolkit does") from error


def _told(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return SILENT
    return f"{type(error).__name__}: {str(error)[:200]}"
