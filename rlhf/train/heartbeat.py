"""A heartbeat of every rank, by which the main rank names those that the others wait for.

A rank that hangs holds all others in a collective, and their devices. Which one it is, none of them sees: all that
they know is that they wait. So a thread of every rank says every few seconds whether its rank waits, in which phase it
is, and where in the code; the main rank compares, and its status says for whom the run waits.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from rlhf.engine.board import Board
from rlhf.engine.ranks import Ranks
from rlhf.train.status import current_phase, report_progress

SECONDS_BETWEEN_BEATS = 10.0
SECONDS_STILL = 60.0
"""A rank that is silent, or that others have waited for, for so long is named."""
_SHOWN = 3
_ROOT = Path(__file__).resolve().parents[2]
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    host: str
    count: int
    """How many beats there were; it stands still when the process does."""
    phase: str
    place: str
    """File, line and function of ours that its main thread is in."""
    waits: bool
    """It is inside of a collective."""
    since: float
    """Seconds since place or phase changed."""


class Heartbeat:
    """The beats of this rank, and on the main rank what follows from those of all."""

    def __init__(self, ranks: Ranks, board: Board) -> None:
        self._ranks, self._board, self._ended = ranks, board, threading.Event()
        self._main = threading.main_thread().ident
        self._count, self._where, self._changed = 0, ("", ""), time.monotonic()
        self._heard = dict.fromkeys(range(ranks.world_size), (0, time.monotonic()))

    def run(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(RuntimeError):  # the main rank may have gone
                self._board.write(json.dumps(asdict(self._own())))
                if self._ranks.is_main:
                    beats = {rank: Beat(**json.loads(text)) for rank, text in self._board.read().items()}
                    report_progress(waits_for=waits_for(beats, self._silent(beats)))

    def end(self) -> None:
        self._ended.set()

    def _own(self) -> Beat:
        frame = sys._current_frames().get(self._main or 0)
        waits, place = _look(frame)
        if (current_phase(), place) != self._where:
            self._where, self._changed = (current_phase(), place), time.monotonic()
        self._count += 1
        return Beat(
            host=os.uname().nodename,
            count=self._count,
            phase=current_phase(),
            place=place,
            waits=waits,
            since=time.monotonic() - self._changed,
        )

    def _silent(self, beats: Mapping[int, Beat]) -> dict[int, float]:
        """Seconds since each rank said something new, by the clock of this one."""
        now = time.monotonic()
        for rank, beat in beats.items():
            if self._heard[rank][0] != beat.count:
                self._heard[rank] = beat.count, now
        return {rank: now - heard for rank, (_, heard) in self._heard.items()}


def waits_for(beats: Mapping[int, Beat], silent: Mapping[int, float]) -> str:
    """Which ranks hold up the others, in words; empty if none does.

    Args:
        beats: the latest of each rank that has had one.
        silent: for how many seconds each has said nothing new.
    """
    named = []
    waiting = any(beat.waits and beat.since > SECONDS_STILL for beat in beats.values())
    for rank, seconds in sorted(silent.items()):
        beat = beats.get(rank)
        if beat is None:
            named += [f"rank {rank}, silent for {seconds:.0f} s"] if seconds > SECONDS_STILL else []
        elif seconds > SECONDS_STILL:
            named.append(f"rank {rank} on {beat.host}, silent for {seconds:.0f} s, last in: {beat.phase}")
        elif waiting and not beat.waits and beat.since > SECONDS_STILL:
            named.append(
                f"rank {rank} on {beat.host}, for {beat.since:.0f} s in: {beat.phase} ({beat.place or 'not our code'})"
            )
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return "; ".join(named[:_SHOWN]) + more


@contextlib.contextmanager
def heart_beating(ranks: Ranks) -> Iterator[None]:
    """Let the heart of this rank beat inside the block. Without others to hear it, there is nothing to do."""
    heartbeat = None
    if ranks.world_size > 1:
        with contextlib.suppress(RuntimeError):  # it helps to find a fault; it is none itself
            heartbeat = Heartbeat(ranks, Board(ranks))
            threading.Thread(target=heartbeat.run, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        if heartbeat is not None:
            heartbeat.end()


def _look(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack waits for other ranks, and the innermost line of ours in it."""
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        waits |= any(part in name for part in _COLLECTIVES)
        if name.startswith(f"{_ROOT}{os.sep}") and "site-packages" not in name:
            path = name.removeprefix(f"{_ROOT}{os.sep}")
            return waits, f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return waits, ""
