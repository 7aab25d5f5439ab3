"""What has become of jobs that were submitted: where they stand, what they say, and their end."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.runs import stage_logs
from launch.slurm.submit import NUMBER, Queued, cancel_job, queued
from rlhf.core.errors import STOP_FILE, ConfigError
from rlhf.train.status import Status, read_status

RUNS = Path("runs")
"""Where runs are looked for that nobody has named."""
DEPTH = ("", "*/", "*/*/")
"""How far below a folder."""
SECONDS_BETWEEN_REQUESTS = 10.0
PENDING = "PENDING"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job, as its run folder knows it."""

    run: Path
    label: str
    """``job``, or the stage that it was submitted for."""
    number: str
    folders: tuple[Path, ...]
    """The run folders of its stages."""

    @property
    def log(self) -> Path:
        return self.run / "slurm" / "logs" / f"{self.number}.log"

    @property
    def status(self) -> Status | None:
        """What the stage says that spoke last; of a stage's own job, that stage."""
        own = [folder for folder in self.folders if folder.name == self.label] or self.folders
        said = [status for status in map(read_status, own) if status is not None]
        return max(said, key=lambda status: status.updated, default=None)


def submitted(name: str | None) -> list[Submitted]:
    """The jobs of a run folder, those of all runs below a folder, or the one of a number; ``None``: all below runs/.

    Raises:
        ConfigError: if there are none.
    """
    of_number = name is not None and name.isdigit() and not Path(name).is_dir()
    folder = RUNS if name is None or of_number else Path(name)
    found = [job for job in _below(folder) if not of_number or job.number == name]
    if found:
        return found
    if of_number:
        raise ConfigError(f"job {name}: no run below {RUNS}/ was submitted as this one; give its run folder")
    raise ConfigError(f"{folder}: no run here was submitted to SLURM (RUN/slurm/*{NUMBER}); give the run folder")


def _below(folder: Path) -> Iterator[Submitted]:
    paths = [path for depth in DEPTH for path in sorted(folder.glob(f"{depth}slurm/*{NUMBER}"))]
    for path in sorted(paths, key=lambda path: (path.parent, path.stat().st_mtime)):
        try:
            number, *folders = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):  # somebody else's, or empty
            continue
        run = path.parents[1]
        yield Submitted(run=run, label=path.stem, number=number, folders=tuple(map(Path, folders)) or (run,))


def of_one_run(name: str | None) -> list[Submitted]:
    """The jobs that :func:`submitted` finds, which must be of a single run.

    Raises:
        ConfigError: if there is none, or several.
    """
    found = submitted(name)
    runs = list(dict.fromkeys(job.run for job in found))
    if len(runs) > 1:
        raise ConfigError(f"{len(runs)} runs were submitted here, give one of them: {', '.join(map(str, runs))}")
    return found


def cells(job: Submitted) -> list[str]:
    """Run, job, number, state, nodes, elapsed, and where it stands or what it waits for."""
    entry, status = queued(job.number), job.status
    where = "" if status is None else f"{status.stage}: {status.reason or status.where}"
    if entry is None:
        return [str(job.run), job.label, job.number, "not in the queue", "", "", where]
    if entry.state == PENDING:
        where = entry.reason
    return [str(job.run), job.label, job.number, entry.state, entry.nodes, entry.elapsed, where]


def latest(jobs: Sequence[Submitted]) -> Submitted:
    """The job whose log was written to last.

    Raises:
        ConfigError: if none has begun.
    """
    begun = [job for job in jobs if job.log.exists()]
    if not begun:
        waiting = [queued(job.number) for job in jobs]
        states = ", ".join(f"job {job.number} is {_words(entry)}" for job, entry in zip(jobs, waiting, strict=True))
        raise ConfigError(f"{jobs[0].run}: no log yet: {states}")
    return max(begun, key=lambda job: job.log.stat().st_mtime)


def _words(entry: Queued | None) -> str:
    return "not in the queue" if entry is None else f"{entry.state} ({entry.reason})"


def stage_log(run: Path, stage: str) -> Path:
    """What the main rank of a stage of a pipeline says.

    Raises:
        ConfigError: naming the stages that have said something.
    """
    for name in ("rank0.log", "launcher.log"):
        path = stage_logs(run, stage) / name
        if path.exists():
            return path
    there = ", ".join(sorted(path.name for path in stage_logs(run, stage).parent.glob("*"))) or "none yet"
    raise ConfigError(f"{run}: no log of a stage {stage}; there are those of: {there}")


def last_attempt(text: str, number: str) -> str:
    """The part of a job's log that its last start has written."""
    starts = [found.start() for found in re.finditer(rf"^\[[^\]]+\] job {number}: start ", text, flags=re.MULTILINE)]
    return text[starts[-1] :] if starts else text


def follow(path: Path, place: int, number: str, seconds: float = 1.0) -> Iterator[str]:
    """What is added to a log behind ``place``, until its job is no longer in the queue."""
    looked, goes_on = time.monotonic(), True
    while True:
        with path.open("rb") as file:
            file.seek(place)
            added = file.read()
        place += len(added)
        if added:
            yield added.decode(errors="replace")
        elif not goes_on:
            return
        if time.monotonic() - looked > 10 * seconds:
            looked, goes_on = time.monotonic(), queued(number) is not None
        time.sleep(seconds)


def cancel(jobs: Sequence[Submitted], *, now: bool) -> Iterator[str]:
    """End the jobs of a run, in words as it happens: those that wait are taken out of the queue, one that runs saves.

    Args:
        jobs: of one run.
        now: leave no time to save.
    Raises:
        SlurmError: if SLURM does not answer, or refuses.
        ConfigError: if none is in the queue.
    """
    there = {job: entry for job in jobs if (entry := queued(job.number)) is not None}
    if not there:
        raise ConfigError(f"{jobs[0].run}: no job of it is in the queue")
    running = []
    for job in reversed(there):  # what waits for others first
        if now or there[job].state == PENDING:
            cancel_job(job.number)
            yield f"job {job.number} ({job.label}): canceled"
        else:
            running.append(job)
    for job in running:
        yield f"job {job.number} ({job.label}): saves at its next step and ends; Ctrl-C leaves it to that"
        end = "ended"
        while (entry := queued(job.number)) is not None:
            if entry.state == PENDING:  # back in the queue: it was paused or preempted, or lost a node
                cancel_job(job.number)
                end = "had gone back into the queue, canceled there"
                break
            (job.run / STOP_FILE).touch()  # ranks that still start take no notice of one that is older than they are
            time.sleep(SECONDS_BETWEEN_REQUESTS)
        (job.run / STOP_FILE).unlink(missing_ok=True)
        yield f"job {job.number} ({job.label}): {end}"
