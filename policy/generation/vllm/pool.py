"""The engines of a run: who writes what, and what happens when one of them is lost."""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from policy.generation.vllm.client import EngineClient, EngineLost, EngineRefused, Weights, WireRow
from policy.generation.vllm.engine.margin_engine import TOKEN_VARIABLE
from policy.generation.vllm.link import Link
from policy.generation.vllm.process import EngineProcess, Launch
from rlhf.core.errors import ConfigError, ModelError, TrainingStopped

log = logging.getLogger(__name__)
T = TypeVar("T")
Answer = Mapping[str, Any]


class EnginePool:
    """Engines that all have the same weights. Only one rank of a run has a pool."""

    def __init__(self, launch: Launch) -> None:
        self._launch, self._config = launch, launch.config
        self._token = os.environ.get(TOKEN_VARIABLE, "") if self._config.urls else secrets.token_hex(16)
        count = len(self._config.urls) or self._config.engines
        self._processes = [] if self._config.urls else [EngineProcess(launch, n, self._token) for n in range(count)]
        self._clients: list[EngineClient | None] = [None] * count
        self._weights: Weights | None = None
        self._streams = self._config.transport != "folder"
        self._links: list[Link | None] = [None] * count
        self._versions = [0] * count  # that the engines have, where weights are sent as a stream
        self._lock = threading.Lock()
        self._of_before = 0
        self._closed = False
        self.restarts = 0
        """How often an engine was started again."""
        self.sleeps = self._config.sleep
        self.max_model_tokens = 0
        """Longest prompt and response together."""

    @property
    def pids(self) -> list[int]:
        """Process ids of the engines on this machine."""
        return [process.pid for process in self._processes]

    def newest_version(self) -> int:
        """The highest version of weights that an engine has which runs already."""
        for number, url in enumerate(self._config.urls):
            try:
                self._clients[number] = self._connect(url)
                self._of_before = max(self._of_before, int(self._client(number).state()["newest"]))
            except (EngineLost, EngineRefused, KeyError) as fault:
                raise ConfigError(f"vllm.urls: {url} is no engine of this toolkit that answers: {fault}") from fault
        return self._of_before

    def set_weights(self, weights: Weights) -> None:
        """Have all engines sample from these weights, which is compared; engines that do not run are started.

        Raises:
            ModelError: if an engine has other weights than it was told to have.
            TrainingStopped: if engines are lost too often.
        """
        self._weights = weights
        self._on_each(self._bring_up_to_date)

    def listen(self, version: int) -> None:
        """Have all engines that lack the weights of ``version`` listen for them; those that do not run are started.

        Raises:
            ModelError: if an engine refuses.
            TrainingStopped: if engines are lost too often.
        """
        lacking = [number for number, has in enumerate(self._versions) if has != version]
        self._on_each(self._join, lacking)  # all of them first: who listens does not wait until another one has started
        self._on_each(lambda number: self._listen(number, version), lacking)

    @contextlib.contextmanager
    def sending(self, name: str, weight: Tensor) -> Iterator[None]:
        """Have a tensor on its way to all engines that listen, as long as the context lasts."""
        links = [link for link in self._links if link is not None and link.listens]
        weight = weight.to(links[0].device) if links else weight
        works = [link.send(name, weight) for link in links]
        yield
        for link, work in zip(links, works, strict=True):
            link.wait(work)

    def take(self, weights: Weights) -> bool:
        """Have all engines take what was sent for these weights, which is compared; whether none was lost on the way.

        One that was lost runs again, and lacks them.

        Raises:
            ModelError: if an engine has other weights than it was told to have.
            TrainingStopped: if engines are lost too often.
        """
        self._weights = weights
        self._on_each(self._take)
        return all(version == weights.version for version in self._versions)

    def generate(
        self,
        rows: Sequence[WireRow],
        settings: Mapping[str, Any],
        advance: Callable[[int], None] | None = None,
        known: Sequence[Answer | None] = (),
    ) -> list[Answer | None]:
        """The response to each row, by weights that were set last; ``None`` to those of an engine that was lost and
        lacks its weights, which is so only where they are sent as a stream.

        Args:
            rows: prompts and seeds.
            settings: in vLLM's words.
            advance: told how many responses there are.
            known: what an earlier call returned: these responses are not asked for again.
        Raises:
            ModelError: if an engine refuses, or answers by other weights.
            TrainingStopped: if engines are lost too often.
        """
        found = {place: answer for place, answer in enumerate(known) if answer is not None}
        left = [place for place in range(len(rows)) if place not in found]

        def keep(place: int, answer: Answer) -> None:
            with self._lock:
                found[place] = answer
                if advance is not None:
                    advance(len(found))

        shares = spread([len(rows[place][0]) for place in left], len(self._clients))
        of_engines = [{left[each]: rows[left[each]] for each in share} for share in shares]
        self._on_each(lambda number: self._generate(number, of_engines[number], settings, keep))
        if self.sleeps:
            self._on_each(self._sleep)
        return [found.get(place) for place in range(len(rows))]

    def close(self) -> None:
        """End the engines that were started here; what still waits for one, here or elsewhere, fails."""
        self._closed = True
        for process in self._processes:
            process.stop()
        for client in filter(None, self._clients):
            client.close()

    def _on_each(self, action: Callable[[int], T], numbers: Sequence[int] | None = None) -> list[T]:
        with ThreadPoolExecutor(len(self._clients)) as threads:
            return list(threads.map(action, range(len(self._clients)) if numbers is None else numbers))

    def _client(self, number: int) -> EngineClient:
        client = self._clients[number]
        assert client is not None, "set_weights() comes first"
        return client

    def _sleep(self, number: int) -> None:
        with contextlib.suppress(EngineLost):  # which is found when it is needed
            self._client(number).sleep()

    def _join(self, number: int) -> None:
        """Have an engine come to where weights are sent; it is started if it does not run."""
        while self._links[number] is None:
            try:
                if self._clients[number] is None:
                    self._start(number, first=True)
                state = self._client(number).state()
                self.max_model_tokens = int(state["max_model_tokens"])
                kind, seconds = self._config.transport, self._config.timeout_seconds
                self._links[number] = Link(self._client(number), kind, int(state["workers"]), seconds)
            except EngineLost as fault:
                self._revive(number, fault)
            except EngineRefused as fault:
                raise ModelError(f"vLLM engine {number}: {fault}") from fault

    def _listen(self, number: int, version: int) -> None:
        link = self._links[number]
        assert link is not None
        try:
            link.listen(version)
        except EngineRefused as fault:
            raise ModelError(f"vLLM engine {number}: {fault}") from fault

    def _take(self, number: int) -> None:
        weights, link = self._weights, self._links[number]
        assert weights is not None
        if self._versions[number] == weights.version:
            return
        assert link is not None, "listen() comes first"
        try:
            link.finish()
            self._push(number)
        except EngineLost as fault:
            self._revive(number, fault)
        except EngineRefused as fault:
            raise ModelError(f"vLLM engine {number}: {fault}") from fault

    def _bring_up_to_date(self, number: int) -> None:
        weights = self._weights
        assert weights is not None
        if self._clients[number] is None and self._processes:
            self._start(number, first=True)
            return
        try:
            self._push(number)
        except EngineLost as fault:
            self._revive(number, fault)
        except EngineRefused as fault:
            raise ModelError(f"vLLM engine {number}: {fault}") from fault

    def _push(self, number: int) -> None:
        weights = self._weights
        assert weights is not None
        self._check(number, self._client(number).update(weights))
        self._versions[number] = weights.version
        if not self.max_model_tokens:
            self.max_model_tokens = int(self._client(number).state()["max_model_tokens"])

    def _check(self, number: int, state: Mapping[str, Any]) -> None:
        """Compare what an engine has with what it is to have."""
        weights = self._weights
        assert weights is not None
        if state.get("version") != weights.version or state.get("sums") != weights.sums:
            raise ModelError(
                f"vLLM engine {number} has weights of version {state.get('version')} with checksums that are not those "
                f"of version {weights.version} in training: it would write by another policy. Models whose weights "
                "vLLM keeps in another type or form cannot be sampled by it: take rollout.backend=hf"
            )

    def _connect(self, url: str) -> EngineClient:
        return EngineClient(url, self._token, timeout_seconds=self._config.timeout_seconds)

    def _start(self, number: int, *, first: bool = False) -> None:
        """Start an engine with the weights that were set last, or where they are sent as a stream, without."""
        weights, process = None if self._streams else self._weights, self._processes[number]
        while True:
            try:
                self._clients[number] = self._connect(process.start(weights))
                state = self._client(number).state()
            except EngineLost as fault:
                process.stop()
                if first:
                    raise ConfigError(f"vLLM engine {number} does not start: {fault}") from fault
                self._count(number, fault)
                continue
            if weights is not None:
                self._check(number, state)
            self.max_model_tokens = int(state["max_model_tokens"])
            if self._config.sleep and not state["sleeps"] and first:
                log.warning("vllm.sleep: engine %d keeps its memory: vLLM cannot give it back on this device", number)
            self.sleeps = bool(state["sleeps"])
            return

    def _revive(self, number: int, fault: EngineLost) -> None:
        """Put an engine in the place of one that is lost: with the weights of now, unless they are sent as a stream."""
        self._links[number], self._versions[number] = None, 0
        if self._processes and not self._processes[number].is_alive:
            fault = EngineLost(f"it ended: {self._processes[number].last_words()}")
        self._count(number, fault)
        if self._processes:
            self._processes[number].stop()
            self._start(number)
        else:
            self._wait_for(number)

    def _wait_for(self, number: int) -> None:
        """Give somebody else's engine the time of a start to come back, and bring it up to date where it is not, unless
        weights are sent as a stream."""
        weights = self._weights
        end = time.monotonic() + self._config.start_seconds
        while True:
            try:
                state = self._client(number).state()
                if weights is not None and state.get("version") == weights.version:  # it is the same one as before
                    self._check(number, state)
                    self._versions[number] = weights.version
                elif not self._streams:
                    self._push(number)
                return
            except EngineLost as fault:
                self._check_open()
                if time.monotonic() > end:
                    raise TrainingStopped(
                        f"vLLM engine {number} at {self._config.urls[number]} is lost ({fault}) and has not come back "
                        f"within {self._config.start_seconds:g} s (vllm.start_seconds)"
                    ) from fault
                time.sleep(1.0)
            except EngineRefused as fault:
                raise ModelError(f"vLLM engine {number}: {fault}") from fault

    def _count(self, number: int, fault: Exception) -> None:
        self._check_open()
        with self._lock:
            self.restarts += 1
            count = self.restarts
        if count > self._config.restarts:
            raise TrainingStopped(
                f"vLLM engine {number} is lost ({fault}), and engines were started again {count - 1} times before "
                f"(vllm.restarts = {self._config.restarts}): look at {self._where(number)}; checkpoints are intact"
            )
        log.warning(
            "vLLM engine %d is lost (%s): it is started again with the weights of now (restart %d of at most %d)",
            number,
            fault,
            count,
            self._config.restarts,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise TrainingStopped("the engines were ended")

    def _where(self, number: int) -> str:
        return str(self._processes[number].log) if self._processes else f"the log of {self._config.urls[number]}"

    def _generate(
        self,
        number: int,
        rows: Mapping[int, WireRow],
        settings: Mapping[str, Any],
        keep: Callable[[int, Answer], None],
    ) -> None:
        left = dict(rows)
        while left:
            weights = self._weights
            assert weights is not None
            places = list(left)
            try:
                for line in self._client(number).generate(weights.version, settings, [left[each] for each in places]):
                    if "place" not in line:
                        continue
                    _check_version(number, line, weights.version)
                    place = places[line["place"]]
                    del left[place]
                    keep(place, line)
                if left:
                    raise EngineLost(f"it ended with {len(left)} of {len(places)} responses to go")
            except EngineLost as fault:
                self._revive(number, fault)
                if self._streams and self._versions[number] != weights.version:
                    return
            except EngineRefused as fault:
                raise ModelError(f"vLLM engine {number}: {fault}") from fault


def _check_version(number: int, answer: Answer, version: int) -> None:
    """Refuse a response of which vLLM says that other weights wrote it, or part of it."""
    if answer["versions"] != [str(version)]:
        raise ModelError(
            f"vLLM engine {number} gave a response by weights of version {', '.join(answer['versions']) or 'unknown'}; "
            f"asked was version {version}"
        )


def spread(lengths: Sequence[int], engines: int) -> list[list[int]]:
    """Places of rows for each engine: the longest first, each to the engine that has the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(engines)]
    loads = [0] * engines
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += lengths[place]
    return [sorted(share) for share in shares]
