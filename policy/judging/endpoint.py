"""A judge behind an OpenAI-compatible endpoint: asked patiently, once for each thing, and remembered on disk."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from policy.judging.config import JudgeConfig
from rlhf.core.errors import DataError
from rlhf.core.files import digest, whole_lines
from rlhf.core.servers import key_in, retry_after
from rlhf.data.messages import Message

LONGEST_WAIT = 60.0
"""Seconds between two tries at the most."""
READINGS = 3
"""Times that a question is asked whose replies hold no verdict."""
LATER = (408, 409, 425, 429)
"""Refusals that another time may not meet, as all from 500 on."""
OF_THE_QUESTION = (400, 413, 422)
"""Refusals that may be about one question: too long, or not liked by a filter."""
REFUSED_AT_FIRST = 3
"""Where so many come before the first reply, the endpoint is asked something that nobody refuses."""

Question = Sequence[Message]
HARMLESS: Question = ({"role": "user", "content": "Say yes."},)
"""Where this is refused, too, it is no matter of single questions."""


class Read(Protocol):
    """What a reply says; raises ValueError where it says nothing."""

    def __call__(self, reply: str, *, was_cut: bool) -> float:
        """``was_cut``: at ``judge.max_tokens``: its end is not known."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A reply that could be read."""

    value: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """What became of the last try of a question."""

    fault: str


class Refused(DataError):
    """The endpoint will not answer anything: a wrong key, model or address."""


class Judge:
    """Asks an endpoint; what it has said before comes from ``cache``, a file of JSON lines keyed by content.

    Refusals of single questions are kept there, too, for as long as ``judge.max_tokens`` is the same.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        """Read the cache, and the key.

        Raises:
            ConfigError: if no header can hold the key.
        """
        self._config, self._cache = config, cache
        self._key = key_in(config.key_variable)
        self._known: dict[str, _Reply] = {}
        self._refused: dict[str, str] = {}
        self._unwritten: dict[str, str] = {}
        """Refusals that may yet turn out to be of all questions."""
        self._lock = threading.Lock()
        self._has_replied = False
        for row in map(json.loads, whole_lines(cache)) if cache.exists() else ():
            if "reply" in row:
                self._known[row["key"]] = _Reply(text=row["reply"], was_cut=row.get("was_cut", False))
            elif row["max_tokens"] == config.max_tokens:
                self._refused[row["key"]] = row["refusal"]

    def unknown(self, questions: Sequence[Question], read: Read) -> list[Question]:
        """Those that it has to be asked, each once."""
        found = {self._name(each): each for each in questions}
        return [each for name, each in found.items() if name not in self._refused and not self._has_read(name, read)]

    def ask(
        self, questions: Sequence[Question], read: Read, advance: Callable[[int], None] = lambda count: None
    ) -> list[Verdict | Unanswered]:
        """What was made of the reply to each question.

        Args:
            questions: conversations.
            read: of a reply; one that it cannot read is asked for again.
            advance: told after each reply how many there are.
        Raises:
            Refused: at once, if the endpoint refuses all questions as such.
        """
        missing = self.unknown(questions, read)
        self._has_replied = any(self._name(each) in self._known for each in questions)
        faults: dict[str, str] = {}
        with (
            httpx.Client(timeout=self._config.timeout_seconds) as client,
            ThreadPoolExecutor(self._config.concurrency) as pool,
        ):
            waiting = [(self._name(each), pool.submit(self._ask, client, each, read)) for each in missing]
            try:
                for count, (name, each) in enumerate(waiting, start=1):
                    fault = each.result()
                    if fault is not None:
                        faults[name] = fault
                    advance(count)
            except BaseException:
                for _, each in waiting:
                    each.cancel()
                raise
        faults = self._refused | faults
        return [self._found(self._name(each), read, faults) for each in questions]

    def _found(self, name: str, read: Read, faults: dict[str, str]) -> Verdict | Unanswered:
        if name in faults and not self._has_read(name, read):
            return Unanswered(fault=faults[name])
        reply = self._known[name]
        return Verdict(value=read(reply.text, was_cut=reply.was_cut), text=reply.text)

    def _has_read(self, name: str, read: Read) -> bool:
        """Whether there is a reply that can be read: another version may have read others."""
        try:
            reply = self._known[name]
            read(reply.text, was_cut=reply.was_cut)
        except (KeyError, ValueError):
            return False
        return True

    def _name(self, question: Question) -> str:
        config = self._config
        asked = json.dumps([config.request, list(question)], sort_keys=True)
        return digest(str(config.url), str(config.model), asked)

    def _ask(self, client: httpx.Client, question: Question, read: Read) -> str | None:
        """Ask until there is a reply that can be read; why there is none."""
        wait, at_least, fault, unread = self._config.wait_seconds, 0.0, "", 0
        for number in range(self._config.tries):
            if number:
                time.sleep(min(max(wait, at_least), LONGEST_WAIT))
                wait, at_least = 2 * wait, 0.0
            try:
                reply = self._try(client, question)
            except _Later as later:
                fault, at_least = str(later), later.seconds
                continue
            except _NotThis as refusal:
                return str(refusal)
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                fault = f"{type(error).__name__}: {str(error)[:120]}" if str(error) else type(error).__name__
                continue
            try:
                read(reply.text, was_cut=reply.was_cut)
            except ValueError as error:
                cut = f"; it was cut at judge.max_tokens = {self._config.max_tokens}" if reply.was_cut else ""
                fault, unread = f"{error}{cut}", unread + 1
                if unread == READINGS:
                    break
            else:
                self._remember(self._name(question), reply)
                return None
        return fault

    def _try(self, client: httpx.Client, question: Question) -> "_Reply":
        response = self._post(client, question)
        if response.status_code in LATER or response.status_code >= 500:
            seconds = retry_after(response.headers.get("retry-after"))
            raise _Later(f"status {response.status_code}", seconds)
        if response.status_code >= 300:
            self._refuse(response, self._name(question), client)
        choice = response.json()["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise ValueError("a reply without text")
        with self._lock:
            self._has_replied = True
            self._write_refusals()
        return _Reply(text=text, was_cut=choice.get("finish_reason") == "length")

    def _post(self, client: httpx.Client, question: Question) -> httpx.Response:
        config = self._config
        limit = {} if config.max_tokens is None else {"max_tokens": config.max_tokens}
        return client.post(
            f"{str(config.url).rstrip('/')}/chat/completions",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            json={"model": config.model, "messages": list(question), **limit, **config.request},
        )

    def _refuse(self, response: httpx.Response, name: str, client: httpx.Client) -> None:
        said = f"status {response.status_code}: {' '.join(response.text[:200].split())}"
        if response.is_redirect:
            said = f"status {response.status_code}: it is at {response.headers['location'][:200]} now"
        if self._key:
            said = said.replace(self._key, "(the key)")
        if response.status_code not in OF_THE_QUESTION:
            raise Refused(f"{self._config.url}: {said}")
        with self._lock:
            self._refused[name] = self._unwritten[name] = said
            if self._has_replied:
                self._write_refusals()
            elif len(self._unwritten) >= REFUSED_AT_FIRST and self._refuses_all(client):
                raise Refused(f"{self._config.url}: {said}")
        raise _NotThis(said)

    def _refuses_all(self, client: httpx.Client) -> bool:
        """Whether a harmless question is refused, too; what cannot be told now is asked at the next refusal."""
        try:
            status = self._post(client, HARMLESS).status_code
        except httpx.HTTPError:
            return False
        if status == httpx.codes.OK:
            self._has_replied = True
            self._write_refusals()
        return status in OF_THE_QUESTION

    def _write_refusals(self) -> None:
        """Keep them: they are of single questions, as there was a reply."""
        for name, said in self._unwritten.items():
            self._write({"key": name, "refusal": said, "max_tokens": self._config.max_tokens})
        self._unwritten.clear()

    def _remember(self, name: str, reply: "_Reply") -> None:
        with self._lock:
            self._known[name] = reply
            self._write({"key": name, "reply": reply.text} | ({"was_cut": True} if reply.was_cut else {}))

    def _write(self, row: dict[str, Any]) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")


@dataclass(frozen=True, kw_only=True)
class _Reply:
    text: str
    was_cut: bool


class _NotThis(Exception):
    """The endpoint refuses this question."""


class _Later(Exception):
    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds
