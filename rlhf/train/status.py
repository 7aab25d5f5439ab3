"""``status.json``: where a run stands and how it ended, written by the run and read by all that watch it.

The main rank writes it into the run folder, in one step, about once a second at most and at each change of phase. A
thread writes it again every few seconds, so that a long step is told from a process that is gone. Another rank that
breaks leaves a file of its own beside it; :func:`read_status` takes it into account.
"""

import contextlib
import functools
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from rlhf.core.clock import clock, process_started
from rlhf.core.errors import ConfigError, RunStopped, UserError
from rlhf.core.files import STATUS, write_json
from rlhf.core.owner import is_running, machine, owning
from rlhf.train.output import this_rank
from rlhf.train.warned import keeping_warnings

SECONDS_BETWEEN_WRITES = 1.0
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_UNTIL_GONE = 60.0
"""A process on another machine that has not written for so long is gone; on this one, that is asked."""
STARTING = "starting"
MINUTES = "time/minutes"
"""Metric: how long the training steps of a run took together, over all of its starts."""
COUNTED = ("pairs", "conversations", "rollouts", "tokens")
"""Metrics of a step that say how much of something was in it."""
RATES = tuple(f"time/{name}_per_second" for name in COUNTED)
SHOWN = ("loss", "perplexity", "accuracy", "reward", "kl", "entropy", "margin/mean", *RATES)


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a run says of itself."""

    stage: str
    state: Literal["running", "finished", "stopped", "failed"] = "running"
    """stopped: saved because it was asked to, and to be continued."""
    phase: str = STARTING
    """What it is doing, in words."""
    unit: str = "step"
    """What ``step`` and ``total`` count."""
    step: int = 0
    total: int = 0
    """0 before it is known."""
    eta_seconds: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    """The latest value of each; ``None`` for one that is not finite. Held-out ones begin with ``eval/``."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What was measured on held-out data at the end, as in ``evaluation.json``."""
    reason: str = ""
    """Why it stopped or failed."""
    rank: int | None = None
    """The rank that broke, where one did."""
    waits_for: str = ""
    """The rank that others wait for for long, and where it stands."""
    waited: bool = False
    """It broke while it was waiting for another rank, which therefore broke first."""
    started: float
    """When the process was started, in seconds since the epoch; so are the others."""
    updated: float
    machine: str
    """Where the process can be asked for: a host, and a space of process ids on it."""
    process: int

    @property
    def is_gone(self) -> bool:
        """It says that it runs, and does not: it was killed, or its machine is off."""
        if self.state != "running":
            return False
        if self.machine != machine():
            return time.time() - self.updated > SECONDS_UNTIL_GONE
        return not is_running(self.process, self.started)

    @property
    def where(self) -> str:
        """Phase, step, time left and metrics on one line."""
        counted = f"{self.unit} {self.step}/{self.total}" if self.total else ""
        left = f"ETA {clock(self.eta_seconds)}" if self.eta_seconds is not None else ""
        waits = f"waits for {self.waits_for}" if self.waits_for else ""
        return "  ".join(filter(None, [self.phase, counted, left, waits, describe(self.metrics)]))


def describe(metrics: Mapping[str, float | None]) -> str:
    """The metrics that a line of progress has room for."""
    parts = []
    for name in SHOWN:
        value = metrics.get(name)
        if value is not None:
            unit = name.removeprefix("time/").replace("_per_second", "/s")
            parts.append(f"{unit} {value:.{1 if '/s' in unit else 4}f}")
    return "  ".join(parts)


def new_status(stage: str, **more: Any) -> Status:
    """The status of this process, which has just begun with ``stage``."""
    started = process_started()
    return Status(stage=stage, started=started, updated=time.time(), machine=machine(), process=os.getpid(), **more)


def write_status(folder: Path, status: Status) -> None:
    """Write ``status`` as that of the main rank of ``folder``. What JSON does not have in it becomes null or text."""
    write_json(folder / STATUS, _plain(asdict(status)), durable=False)


def remove_status(folder: Path) -> None:
    """Remove the status of the main rank and of all ranks that broke."""
    for path in (folder / STATUS, *folder.glob(_name("*"))):
        path.unlink(missing_ok=True)


def read_status(folder: Path) -> Status | None:
    """What the run in ``folder`` says of itself; ``None`` if it has said nothing yet.

    Of several ranks that broke, the cause is the first that was not waiting for another.
    """
    main = _read(folder / STATUS)
    if main is None or main.state in ("finished", "stopped"):
        return main
    broken = [main] if main.state == "failed" else []
    broken += [each for each in map(_read, sorted(folder.glob(_name("*")))) if each is not None]
    if not broken:
        return main
    cause = min(broken, key=lambda each: (each.waited, each.updated))
    return replace(main, state="failed", reason=cause.reason, rank=cause.rank, waited=cause.waited)


# The writing side: a process has one run, and so one recorder.


class _Recorder:
    """Writes the status of this process, from here and from a thread that shows that it lives."""

    def __init__(self, folder: Path, stage: str) -> None:
        before = _read(folder / STATUS)
        self.earlier = before.metrics if before is not None else {}
        self.folder, self.status = folder, new_status(stage)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._written = -math.inf

    def start(self) -> None:
        threading.Thread(target=self._beat, name="status", daemon=True).start()

    def change(self, *, at_once: bool, **changes: Any) -> None:
        with self._lock:
            self.status = replace(self.status, **changes)
            if at_once or time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
                self._write()

    def end(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            with self._lock:
                if not self._ended.is_set():
                    self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self.status = replace(self.status, updated=time.time())
        with contextlib.suppress(OSError):  # a full disk is told by what matters more
            if self.folder.is_dir():  # not while an import puts another one in its place
                write_status(self.folder, self.status)


_recorder: _Recorder | None = None
_phase = STARTING
"""What this rank is doing, which need not be the one that writes."""


@contextlib.contextmanager
def recording(folder: Path, stage: str) -> Iterator[None]:
    """Keep the status of ``folder``: what this process reports while it is inside, and how it ended.

    The main rank owns the folder meanwhile. Ranks other than the main one write only that they broke.

    Raises:
        ConfigError: if ``folder`` is a file, or cannot be written to.
        Owned: if another run is at work in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output = {folder}: a file, expected the folder of the run; give another output=FOLDER")
    with owning(folder, stage) if this_rank() == "0" else contextlib.nullcontext(), _recorded(folder, stage):
        yield


@contextlib.contextmanager
def _recorded(folder: Path, stage: str) -> Iterator[None]:
    global _recorder
    rank = int(this_rank())
    own = folder / _name(str(rank))
    with contextlib.suppress(OSError):
        own.unlink(missing_ok=True)
    if rank == 0:
        for path in folder.glob(_name("*")):  # of an earlier start, perhaps of more ranks
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < process_started():
                    path.unlink()
    recorder = _Recorder(folder, stage)
    if rank == 0:
        _recorder = recorder
        recorder.change(at_once=True)
        recorder.start()
    kept = keeping_warnings(folder, lambda: recorder.status.step) if rank == 0 else contextlib.nullcontext()
    try:
        with kept:
            yield
        report_status(state="finished", phase="finished", eta_seconds=None)
    except RunStopped as error:
        report_status(state="stopped", phase="stopped", eta_seconds=None, reason=str(error))
        raise
    except BaseException as error:
        broken: dict[str, Any] = {"state": "failed", "phase": "failed", "eta_seconds": None}
        broken |= {"reason": _reason(error), "rank": rank, "waited": _waited(error)}
        if rank == 0:
            report_status(**broken)
        else:
            with contextlib.suppress(OSError):
                said = asdict(replace(recorder.status, updated=time.time(), **broken))
                write_json(own, _plain(said), durable=False)
        raise
    finally:
        recorder.end()
        _recorder = None


def report_status(**changes: Any) -> None:
    """Change fields of the status and write it; without a run, and on ranks other than the main one, nothing."""
    if _recorder is not None:
        _recorder.change(at_once=True, **changes)


def current_phase() -> str:
    """What this rank, main or not, is doing."""
    return _phase


def report_phase(text: str) -> None:
    """Say what the run is doing from now on."""
    global _phase
    _phase = text
    if _recorder is not None and _recorder.status.phase != text:
        _recorder.change(at_once=True, phase=text)


def report_progress(**changes: Any) -> None:
    """Change fields as :func:`report_status` does, but write them about once a second at most."""
    if _recorder is not None:
        _recorder.change(at_once=False, **changes)


def report_metrics(metrics: Mapping[str, float], **changes: Any) -> None:
    """Put the latest ``metrics`` over those before, and change further fields; written about once a second at most."""
    if _recorder is not None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        _recorder.change(at_once=False, metrics=_recorder.status.metrics | finite, **changes)


def take_over_metrics() -> None:
    """Go on with the metrics of the process whose checkpoint this run continues."""
    if _recorder is not None:
        _recorder.change(at_once=False, metrics=_recorder.earlier | _recorder.status.metrics)


def _name(rank: str) -> str:
    return f"status.rank{rank}.json"


def _read(path: Path) -> Status | None:
    """A status, also one of another version: fields that this one does not know are passed over."""
    try:
        return _adapter().validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


@functools.cache
def _adapter() -> TypeAdapter[Status]:
    return TypeAdapter(Status)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it, at any depth: null for a number that is not finite, else text for the unknown."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    said = traceback.TracebackException(type(error), error, None)
    said.__notes__ = None  # they come behind the cause
    return [*said.format_exception_only()][-1].strip()


def _waited(error: BaseException) -> bool:
    """Whether ``error`` came out of a call that waits for other ranks."""
    frames = traceback.walk_tb(error.__traceback__)
    inside = any("torch/distributed/" in frame.f_code.co_filename for frame, _ in frames)
    return inside or getattr(error, "of_another_rank", False)
