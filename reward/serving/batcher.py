"""Rows of many requests, scored together: one thread takes all that waits, and batches it by length."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

Score = Callable[[Sequence[np.ndarray]], list[float]]
"""Scores of token rows, in their order."""


class Full(Exception):
    """There is no room for the rows; ``seconds`` until there may be."""

    def __init__(self, waiting: int, capacity: int, seconds: int) -> None:
        super().__init__(f"{waiting} texts wait, and {capacity} may; try again in {seconds} s")
        self.seconds = seconds


@dataclass
class Counts:
    """What has been done so far."""

    rows: int = 0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    """Spent on scoring."""


@dataclass(frozen=True)
class _Job:
    rows: Sequence[np.ndarray]
    answer: "Future[list[float]]" = field(default_factory=Future)


class Batcher:
    """A bounded queue before a model.

    Args:
        score: asked by one thread alone.
        capacity: rows that may wait.
        pass_tokens: tokens that are taken out of the queue at once; a larger request is taken alone.
    """

    def __init__(self, score: Score, *, capacity: int, pass_tokens: int) -> None:
        self._score, self.capacity, self._pass_tokens = score, capacity, pass_tokens
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = 0
        self.counts = Counts()
        self._thread = threading.Thread(target=self._work, name="scores", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[np.ndarray]) -> "Future[list[float]]":
        """The scores of ``rows``, once they are known.

        Raises:
            Full: if so many rows wait that these have no room.
        """
        job = _Job(rows)
        with self._changed:
            if self.waiting + len(rows) > self.capacity:
                raise Full(self.waiting, self.capacity, self._seconds_to_wait())
            self._jobs.append(job)
            self.waiting += len(rows)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Wait until all that waits is answered, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _seconds_to_wait(self) -> int:
        """How long what waits now will take, by the speed so far."""
        speed = self.counts.rows / self.counts.seconds if self.counts.seconds else self.capacity
        return max(1, math.ceil(self.waiting / speed))

    def _work(self) -> None:
        while jobs := self._take():
            rows = [row for job in jobs for row in job.rows]
            began = time.perf_counter()
            try:
                scores = self._score(rows)
            except Exception as error:  # whatever a model's own code raises: those who asked are told
                for job in jobs:
                    job.answer.set_exception(error)
                continue
            self.counts.seconds += time.perf_counter() - began
            self.counts.rows += len(rows)
            self.counts.tokens += sum(map(len, rows))
            self.counts.passes += 1
            start = 0
            for job in jobs:
                job.answer.set_result(scores[start : start + len(job.rows)])
                start += len(job.rows)

    def _take(self) -> list[_Job]:
        """What to do next, in the order of arrival; nothing at the end."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            taken: list[_Job] = []
            tokens = 0
            while self._jobs and (not taken or tokens + _tokens(self._jobs[0]) <= self._pass_tokens):
                tokens += _tokens(self._jobs[0])
                taken.append(self._jobs.popleft())
            self.waiting -= sum(len(job.rows) for job in taken)
            return taken


def _tokens(job: _Job) -> int:
    return sum(map(len, job.rows))
