"""Scores from one or several servers of one reward model: asked patiently, in turn, and never believed blindly."""

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import httpx
import numpy as np

from reward.serving.card import Card, read_card
from reward.serving.wire import NOT_FINITE, TOOLS_KEY, request_of
from rlhf.core.errors import ConfigError, ModelError
from rlhf.core.servers import (
    CONCURRENCY,
    PATIENCE_SECONDS,
    TIMEOUT_SECONDS,
    check_address,
    key_in,
    retry_after,
)
from rlhf.data.messages import Message

KEY_VARIABLE = "MARGIN_RLHF_REWARD_KEY"
"""The environment variable that holds the bearer token of the servers."""
START_PATIENCE_SECONDS = 60.0
"""What a server may be away for at the start, when its address may be mistaken."""
FEW_TRIES = 3
"""Tries of a request that stays without an answer, each time for the whole timeout, or that a server fails on."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds that a server is left alone after a fault, doubled with each further one, or longer where it says so."""
ROWS_AT_ONCE = 8

log = logging.getLogger(__name__)


@dataclass
class _Server:
    url: str
    asked: int = 0
    """Requests that it has not answered yet."""
    faults: int = 0
    """How many there were in a row."""
    rests_until: float = 0.0


class _Fault(Exception):
    """A try that gave nothing; another may."""

    def __init__(self, what: str, *, lasting: bool = False, seconds: float = 0.0) -> None:
        """``lasting``: a few more tries will tell; ``seconds``: until the server wants to be asked again."""
        super().__init__(what)
        self.lasting, self.seconds = lasting, seconds


@dataclass
class RewardServers:
    """Servers at one or several addresses, which must serve the same model.

    Every request names the model by its card: a server that has begun to serve another one refuses it.

    Attributes:
        urls: base addresses, such as http://127.0.0.1:8000.
        timeout_seconds: that one request may take.
        concurrency: requests that are on the way at one time.
        patience_seconds: after which a request that nobody could take is given up.
        setting: names the addresses in messages.
    """

    urls: Sequence[str]
    timeout_seconds: float = TIMEOUT_SECONDS
    concurrency: int = CONCURRENCY
    patience_seconds: float = PATIENCE_SECONDS
    first_wait: float = FIRST_WAIT
    setting: str = "reward"
    retried: int = field(default=0, init=False)
    """Tries that gave nothing so far."""

    def __post_init__(self) -> None:
        """Refuse what is no address.

        Raises:
            ConfigError: naming it.
        """
        for url in self.urls:
            try:
                check_address(self.setting, url)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        self._servers = [_Server(url.rstrip("/")) for url in self.urls]
        self._lock = threading.Lock()

    @functools.cached_property
    def card(self) -> Card:
        """What all servers serve.

        Raises:
            ModelError: if one of them is no server of a reward model, or they serve different ones.
        """
        found = {server.url: self._card(server) for server in self._servers}
        (first, card), *others = found.items()
        for url, other in others:
            differ = card.differences(other)
            if differ:
                raise ModelError(
                    f"{self.setting}: {first} and {url} serve different models: {', '.join(differ)}. Servers that are "
                    "asked in turn must serve the same"
                )
        return card

    def score_tokens(self, rows: Sequence[np.ndarray]) -> list[float]:
        """Scores of token rows, in their order.

        Raises:
            ModelError: naming the server and what came of it, if one of them stays without a score.
        """
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))  # rows of like length in one request
        chunks = [order[start : start + ROWS_AT_ONCE] for start in range(0, len(order), ROWS_AT_ONCE)]
        asked = [({"input": [rows[place].tolist() for place in chunk]}, len(chunk)) for chunk in chunks]
        scores = [0.0] * len(rows)
        for chunk, found in zip(chunks, self.ask("/classify", asked), strict=True):
            for place, score in zip(chunk, found, strict=True):
                scores[place] = score
        return scores

    def score_conversations(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """Scores of conversations, each in the template of the served model; see :meth:`score_tokens`."""
        asked = [(request_of(each), 1) for each in conversations]
        return [score for (score,) in self.ask("/classify", asked)]

    def refusals(self, prompts: Sequence[Sequence[Message]]) -> dict[int, str]:
        """Places of the prompts whose answers could not be scored, as the template cannot show them; and why not.

        Raises:
            ModelError: naming the server, if one cannot be asked.
        """
        answer: Message = {"role": "assistant", "content": "."}
        bodies = [request_of([*prompt, answer]) | {"add_generation_prompt": False} for prompt in prompts]
        told = self._all(self._refusal, [(body,) for body in bodies])
        return {place: why for place, why in enumerate(told) if why}

    def ask(self, path: str, bodies: Sequence[tuple[dict[str, Any], int]]) -> list[list[float]]:
        """Scores of requests to ``path``, each with how many scores it asks for; see :meth:`score_tokens`."""
        return self._all(lambda body, count: self._ask(path, body, count), bodies)

    def _all(self, request: Callable[..., Any], asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What becomes of many requests, some of them at one time."""
        _ = self.card  # once, before all
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(request, *each) for each in asked]
            try:
                return [each.result() for each in waiting]
            except BaseException:
                for each in waiting:
                    each.cancel()
                raise

    def _ask(self, path: str, body: dict[str, Any], count: int) -> list[float]:
        return self._post(path, body, lambda answer, url: _scores(self._accepted(answer, url), url, count))

    def _refusal(self, body: dict[str, Any]) -> str:
        """Why a server would not take this conversation; nothing where it would."""

        def read(answer: httpx.Response, url: str) -> tuple[str, Any]:
            if answer.status_code == 400:
                return _told(answer), None
            return "", self._accepted(answer, url).json().get("tokens")

        why, tokens = self._post("/tokenize", body, read)
        offered = body.get(TOOLS_KEY)
        if why or offered is None:
            return why
        _, without = self._post("/tokenize", {key: value for key, value in body.items() if key != TOOLS_KEY}, read)
        if tokens != without:
            return ""
        names = [str(tool["function"]["name"]) for tool in offered["tools"]]
        return f"the template does not show the tools of the conversation ({', '.join(names[:3])})"

    def _post(self, path: str, body: dict[str, Any], read: Callable[[httpx.Response, str], Any]) -> Any:
        """What ``read`` makes of the first answer of a server at some address."""
        asked = body | {"model": str(self.card)}

        def checked(answer: httpx.Response, server: _Server) -> Any:
            if answer.status_code == 404:
                self._explain(answer, server)
            return read(answer, server.url)

        return self._patiently(lambda server: self._send(server, "POST", path, asked), checked)

    def _explain(self, answer: httpx.Response, server: _Server) -> NoReturn:
        """Say why a server does not know a path or the model; a proxy before it may have lost it for a moment.

        Raises:
            ModelError: if it serves another model.
        """
        if self._card(server) != self.card:
            raise ModelError(
                f"{self.setting}: {server.url} does not serve {self.card} any more: it was started anew with another "
                "model. Serve the one that this run began with"
            )
        raise _Fault(f"status 404: {_told(answer)}", lasting=True)

    def _card(self, server: _Server) -> Card:
        def read(answer: httpx.Response, server: _Server) -> Card:
            url = server.url
            try:
                names = [str(each["id"]) for each in self._accepted(answer, url).json()["data"]]
            except (ValueError, LookupError, TypeError) as error:
                raise ModelError(
                    f"{self.setting}: {url}: no server of models ({type(error).__name__}: {error})"
                ) from None
            card = next(filter(None, map(read_card, names)), None)
            if card is None:
                raise ModelError(
                    f"{self.setting}: {url} serves {', '.join(names) or 'nothing'}, and does not say which reward "
                    "model that is: serve it with rlhf serve reward DIR, or vllm serve DIR --config DIR/vllm.yaml"
                )
            return card

        return self._patiently(
            lambda _: self._send(server, "GET", "/v1/models", None), read, server, START_PATIENCE_SECONDS
        )

    @functools.cached_property
    def _client(self) -> httpx.Client:
        key = key_in(KEY_VARIABLE)
        return httpx.Client(
            timeout=self.timeout_seconds,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
            trust_env=False,
        )

    def _patiently(
        self,
        send: Callable[[_Server], httpx.Response],
        read: Callable[[httpx.Response, _Server], Any],
        only: _Server | None = None,
        at_most: float = math.inf,
    ) -> Any:
        """What ``read`` makes of the first answer that is one.

        Raises:
            ModelError: if none comes within the patience, or ``at_most`` so many seconds, naming the server that was
                asked last.
        """
        began = time.monotonic()
        end = began + min(self.patience_seconds, at_most)
        number = lasting = 0
        while True:
            server = only or self._next()
            time.sleep(max(0.0, min(server.rests_until, end) - time.monotonic()))
            number += 1
            try:
                answer = read(send(server), server)
            except _Fault as fault:
                lasting += fault.lasting
                self._rest(server, fault)
                if lasting == FEW_TRIES or time.monotonic() >= end:
                    who = "asked" if len(self._servers) == 1 else "the servers were asked"
                    times = f"{who} {number} time{'s' * (number > 1)} in {time.monotonic() - began:.0f} s"
                    raise ModelError(f"{self.setting}: {server.url}: {fault} ({times})") from fault
            else:
                with self._lock:
                    server.faults = 0
                return answer

    def _next(self) -> _Server:
        """The server with the fewest requests of those that do not rest, or the one that rests the shortest."""
        now = time.monotonic()
        with self._lock:
            return min(self._servers, key=lambda each: (max(0.0, each.rests_until - now), each.asked))

    def _rest(self, server: _Server, fault: _Fault) -> None:
        with self._lock:
            self.retried += 1
            now = time.monotonic()
            if server.rests_until > now:
                return  # another request has met the same fault just now
            server.faults += 1
            wait = min(LONGEST_WAIT, self.first_wait * 2 ** min(server.faults - 1, 10))
            wait = max(wait, min(fault.seconds, self.patience_seconds))
            server.rests_until = now + wait
        log.warning("%s: %s: %s; it is asked again after %.1f s", self.setting, server.url, fault, wait)

    def _send(self, server: _Server, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        with self._lock:
            server.asked += 1
        try:
            return self._client.request(method, server.url + path, json=body)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise _Fault(f"no answer within {self.timeout_seconds:g} s", lasting=True) from error
        except httpx.HTTPError as error:
            raise _Fault(f"{type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                server.asked -= 1

    def _accepted(self, answer: httpx.Response, url: str) -> httpx.Response:
        """The same answer, if it is one.

        Raises:
            ModelError: if the server refuses the request as such.
        """
        status = answer.status_code
        if status == 500 and _error(answer).get("type") == NOT_FINITE:
            raise ModelError(f"{self.setting}: {url}: {_told(answer)}")
        if status in (408, 429) or status >= 500:
            seconds = retry_after(answer.headers.get("retry-after"))
            raise _Fault(f"status {status}: {_told(answer)}", lasting=status == 500, seconds=seconds)
        if status in (401, 403):
            raise ModelError(f"{self.setting}: {url}: status {status}: set {KEY_VARIABLE} to the key of the server")
        if status != 200:
            raise ModelError(f"{self.setting}: {url}: status {status}: {_told(answer)}")
        return answer


def _scores(answer: httpx.Response, url: str, count: int) -> list[float]:
    """The numbers in an answer of ``/classify`` or ``/score``.

    Raises:
        ModelError: if they are not as many as were asked for, or one is not finite.
    """
    try:
        data = sorted(answer.json()["data"], key=lambda each: each["index"])
        found = [each["probs"] if "probs" in each else [each["score"]] for each in data]
        scores = [float(score) for (score,) in found]
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{url}: its answer is none of a reward model: {answer.text[:200]!r}") from error
    if len(scores) != count or [each["index"] for each in data] != list(range(count)):
        raise ModelError(f"{url}: gave {len(scores)} scores for {count} texts")
    bad = next((place for place, score in enumerate(scores) if not math.isfinite(score)), None)
    if bad is not None:
        raise ModelError(f"{url}: the score of a text is {scores[bad]}: the weights that it serves are broken")
    return scores


def _told(answer: httpx.Response) -> str:
    """What an answer says of a fault."""
    return " ".join(str(_error(answer).get("message") or answer.text).split())[:300]


def _error(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer, in whatever form servers write it; nothing where there is none."""
    try:
        told = answer.json()["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return told if isinstance(told, dict) else {"message": told}
