"""Handing a job to SLURM, and what SLURM says about it in words that help."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.profile import ClusterProfile, seconds_of
from launch.slurm.script import Job, write_script
from rlhf.core.errors import ConfigError, UserError
from rlhf.core.files import write_text

_SECONDS = 60.0
"""How long SLURM may take to answer."""
NUMBER = ".id"
"""Ends the names of files that hold the number of a job and, a line each, the run folders of its stages."""


class SlurmError(UserError):
    """SLURM did not take a job."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What sinfo says of one."""

    nodes: int
    time: str
    """The longest that a job may take, as SLURM writes it."""

    @property
    def time_seconds(self) -> int | None:
        """``None`` for no limit."""
        return None if self.time in ("infinite", "n/a") else seconds_of(self.time)


def submit(job: Job, profile: ClusterProfile, after: Sequence[str] = (), behind: Sequence[str] = ()) -> str:
    """Write the script of ``job`` into its run folder and submit it; the job's number.

    :func:`check_cluster` and :func:`check_no_other` come first, for all jobs that belong together.

    Args:
        job: what to run.
        profile: on what.
        after: numbers of jobs that must have finished well before.
        behind: numbers of jobs that must have ended before, in whatever way.
    Raises:
        SlurmError: if there is no SLURM here, or it refuses.
        ConfigError: if the profile cannot run such a job.
    """
    write_script(job, profile)
    answer = _ask(["sbatch", "--parsable", *waiting(after, behind), str(job.script)])
    if answer.returncode != 0:
        raise SlurmError(f"sbatch {job.script}: {_refusal(answer.stderr, profile)}")
    number = answer.stdout.strip().partition(";")[0]
    folders = [each.output for each in job.stages] or [job.output]
    write_text(_number_file(job), "".join(f"{line}\n" for line in (number, *(each.absolute() for each in folders))))
    return number


def waiting(after: Sequence[str], behind: Sequence[str]) -> list[str]:
    """Options of sbatch for a job that waits for others; see :func:`submit`."""
    conditions = [":".join([kind, *jobs]) for kind, jobs in (("afterok", after), ("afterany", behind)) if jobs]
    return [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"] if conditions else []


def partitions() -> dict[str, Partition]:
    """The partitions of this cluster by name.

    Raises:
        SlurmError: if there is no SLURM here, or its controller does not answer.
    """
    answer = _ask(["sinfo", "--noheader", "--format=%R %D %l"])
    if answer.returncode != 0:
        raise SlurmError(f"sinfo: {_last_line(answer.stderr)}; is SLURM's controller up? (scontrol ping)")
    found: dict[str, Partition] = {}
    for name, nodes, limit in (line.split() for line in answer.stdout.splitlines() if line.strip()):
        before = found[name].nodes if name in found else 0  # a line for each state of nodes
        found[name] = Partition(nodes=before + int(nodes), time=limit)
    return found


def check_cluster(profile: ClusterProfile) -> None:
    """Compare what SLURM itself would take and then never start.

    Raises:
        SlurmError: if there is no SLURM here, or its controller does not answer.
        ConfigError: if it has no such partition, too few nodes, or not so much time. Of several partitions
            (``gpu,gpu_long``) one must do.
    """
    there = partitions()
    if profile.partition is None:
        most = max((each.nodes for each in there.values()), default=0)
        if profile.nodes > most:
            raise ConfigError(f"profile.nodes = {profile.nodes}: the largest partition has {most} nodes")
        return
    names = profile.partition.split(",")
    unknown = [name for name in names if name not in there]
    if unknown:
        which = f", not {', '.join(unknown)}" if len(names) > 1 else ""
        raise ConfigError(
            f"profile.partition = {profile.partition}: this cluster has {', '.join(sorted(there))}{which}"
        )
    obstacles = [_obstacle(profile, name, there[name]) for name in names]
    if all(obstacles):
        raise ConfigError("; ".join(obstacles))


def _obstacle(profile: ClusterProfile, name: str, partition: Partition) -> str:
    """Why a partition cannot have the job; empty if it can."""
    if profile.nodes > partition.nodes:
        return f"profile.nodes = {profile.nodes}: partition {name} has {partition.nodes} nodes"
    if partition.time_seconds is not None and profile.time_seconds > partition.time_seconds:
        return f"profile.time = {profile.time}: partition {name} allows {partition.time}"
    return ""


@dataclass(frozen=True, kw_only=True)
class Queued:
    """What squeue says of a job."""

    state: str
    """PENDING, RUNNING and so on."""
    nodes: str
    elapsed: str
    reason: str
    """Why it waits."""


def queued(number: str) -> Queued | None:
    """A job; ``None`` if it is no longer in the queue.

    Raises:
        SlurmError: if there is no SLURM here, or its controller does not answer.
    """
    answer = _ask(["squeue", "--noheader", "--format=%T|%D|%M|%r", "--jobs", number])
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise SlurmError(f"squeue: {_last_line(answer.stderr)}; is SLURM's controller up? (scontrol ping)")
    line = answer.stdout.strip().partition("\n")[0]
    if not line:
        return None
    state, nodes, elapsed, reason = line.split("|", 3)
    return Queued(state=state, nodes=nodes, elapsed=elapsed, reason=reason)


def cancel_job(number: str) -> None:
    """Take a job out of the queue, or end it.

    Raises:
        SlurmError: if SLURM does not do it.
    """
    answer = _ask(["scancel", number])
    if answer.returncode != 0:
        raise SlurmError(f"scancel {number}: {_last_line(answer.stderr)}")


def check_no_other(job: Job) -> None:
    """Two jobs in one run folder would write over each other's checkpoints.

    Raises:
        ConfigError: if one is there already, of whatever stage.
    """
    for path in sorted(job.folder.glob(f"*{NUMBER}")):
        number = path.read_text().partition("\n")[0]
        entry = queued(number)
        if entry is not None:
            raise ConfigError(
                f"{job.output}: job {number} for this run folder is {entry.state}; it goes on by itself. To start "
                f"another: scancel {number} first, or choose another output"
            )


def _number_file(job: Job) -> Path:
    return job.folder / f"{job.label}{NUMBER}"


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]}: no such command here; submit on a login node of the cluster "
            "(rlhf slurm render prints the script anywhere)"
        )
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {_SECONDS:g} s; is SLURM's controller up?") from None


def _refusal(text: str, profile: ClusterProfile) -> str:
    """sbatch's last word, with what in the profile it is about."""
    said = re.sub(r"^(sbatch: )?(error: )?(Batch job submission failed: )?", "", _last_line(text))
    hints = {
        "account": f"account = {profile.account}, partition = {profile.partition}",
        "qos": f"qos = {profile.qos}",
        "time limit": f"time = {profile.time}",
        "feature": f"constraint = {profile.constraint}",
        "node configuration": f"nodes = {profile.nodes}, devices = {profile.devices}, cpus = {profile.cpus}, "
        f"memory = {profile.memory}",
        "memory": f"memory = {profile.memory}",
        "generic resource": f"devices = {profile.devices}, device_kind = {profile.device_kind}, "
        f"gpu_type = {profile.gpu_type}",
    }
    about = next((hint for word, hint in hints.items() if word in said.lower()), None)
    return f"{said} (profile: {about})" if about else said


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
