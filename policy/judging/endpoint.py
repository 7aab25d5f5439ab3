"""A judge behind an OpenAI-compatible endpoint: asked patiently, once for each thing, and remembered on disk."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from rlhf.core.errors import DataError
from rlhf.core.files import digest, whole_lines
from rlhf.data.messages import Message

LONGEST_WAIT = 60.0
"""Seconds between two tries at the most."""
FAULTS_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the judge is, and how it is asked."""

    url: str
    """Base address, such as https://api.openai.com/v1."""
    model: str
    key: str | None = None
    """Sent as bearer token; never written anywhere."""
    timeout_seconds: float = 120.0
    tries: int = 6
    """Times that a question is asked: again after 429, 5xx, silence, or an answer that cannot be read."""
    first_wait: float = 1.0
    """Seconds before the second try; doubled each time, unless the answer says how long (Retry-After)."""
    concurrency: int = 8
    max_tokens: int = 16


class Unanswered(Exception):
    """What became of the last try of a question."""


class Refused(DataError):
    """The endpoint will not answer anything: a wrong key, model or address."""


class Judge:
    """Asks an endpoint; what it has said before comes from ``cache``, a file of JSON lines keyed by content."""

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        self._endpoint, self._cache = endpoint, cache
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        if cache.exists():
            self._known = {row["key"]: row["reply"] for row in map(json.loads, whole_lines(cache))}

    def unknown(self, questions: Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
        """Those that it has to be asked, each once."""
        return [*{self._key(each): each for each in questions if self._key(each) not in self._known}.values()]

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        read: Callable[[str], Any],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Any]:
        """What ``read`` makes of the reply to each question.

        Args:
            questions: conversations.
            read: of a reply; raises ValueError for one that cannot be read, which is asked again.
            advance: told after each reply how many there are.
        Raises:
            DataError: if questions stay without a reply, after all others were asked and remembered; or at once, if
                the endpoint refuses them as such.
        """
        missing = self.unknown(questions)
        faults: list[str] = []
        with (
            httpx.Client(timeout=self._endpoint.timeout_seconds) as client,
            ThreadPoolExecutor(self._endpoint.concurrency) as pool,
        ):
            waiting = [pool.submit(self._ask, client, question, read) for question in missing]
            try:
                for count, each in enumerate(waiting, start=1):
                    try:
                        each.result()
                    except Unanswered as fault:
                        faults.append(str(fault))
                    advance(count)
            except BaseException:
                for each in waiting:
                    each.cancel()
                raise
        if faults:
            told = "; ".join(dict.fromkeys(faults[:FAULTS_TOLD]))
            raise DataError(
                f"{self._endpoint.url}: {len(faults)} of {len(missing)} questions have no answer that can be read "
                f"after {self._endpoint.tries} tries each ({told}). What was answered is kept in {self._cache}: the "
                "same command asks for the rest"
            )
        return [read(self._known[self._key(question)]) for question in questions]

    def _key(self, question: Sequence[Message]) -> str:
        endpoint = self._endpoint
        return digest(
            endpoint.url, endpoint.model, str(endpoint.max_tokens), json.dumps(list(question), sort_keys=True)
        )

    def _ask(self, client: httpx.Client, question: Sequence[Message], read: Callable[[str], Any]) -> None:
        wait, fault = self._endpoint.first_wait, ""
        for number in range(self._endpoint.tries):
            if number:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
            try:
                reply = self._try(client, question)
                read(reply)
            except _Later as later:
                fault, wait = str(later), wait if later.seconds is None else later.seconds
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                fault = f"{type(error).__name__}: {str(error)[:120]}" if str(error) else type(error).__name__
            else:
                self._remember(self._key(question), reply)
                return
        raise Unanswered(fault)

    def _try(self, client: httpx.Client, question: Sequence[Message]) -> str:
        endpoint = self._endpoint
        response = client.post(
            f"{endpoint.url.rstrip('/')}/chat/completions",
            headers={"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {},
            json={
                "model": endpoint.model,
                "messages": list(question),
                "temperature": 0,
                "max_tokens": endpoint.max_tokens,
            },
        )
        if response.status_code == 429 or response.status_code >= 500:
            raise _Later(f"status {response.status_code}", response.headers.get("retry-after"))
        if response.status_code >= 400:
            raise Refused(f"{endpoint.url}: status {response.status_code}: {response.text[:200]}")
        return str(response.json()["choices"][0]["message"]["content"])

    def _remember(self, key: str, reply: str) -> None:
        with self._lock:
            self._known[key] = reply
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with self._cache.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"key": key, "reply": reply}) + "\n")


class _Later(Exception):
    def __init__(self, text: str, seconds: str | None) -> None:
        super().__init__(text)
        try:
            self.seconds = None if seconds is None else float(seconds)
        except ValueError:  # a date
            self.seconds = None
