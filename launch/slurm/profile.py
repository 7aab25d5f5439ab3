"""The cluster profile: what a job asks for and how its nodes are made ready. One YAML serves all recipes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from launch.runs import PipelineStage
from rlhf.config import load_config
from rlhf.core.errors import ConfigError

PREFIX = "profile."
"""Prefix of settings on the command line that belong to the profile."""
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class ClusterProfile:
    """A cluster as a job sees it."""

    nodes: Annotated[int, Gt(0)] = 1
    """Nodes of a job."""
    devices: Annotated[int, Gt(0)] = 8
    """Devices that a job uses on each node, one rank on each."""
    device_kind: Literal["gpu", "cpu"] = "gpu"
    """gpu: devices are asked for with --gpus-per-node. cpu: ranks compute on CPUs, and nothing is asked for."""
    gpu_type: str | None = None
    """Type of GPU, by the cluster's name for it (h100); any if left out."""
    cpus: Annotated[int, Gt(0)] | None = None
    """CPUs of a job on each node; the cluster's default if left out."""
    memory: str | None = None
    """Host memory of a job on each node, such as 500G; "0" is all of it; the cluster's default if left out."""
    time: str = "24:00:00"
    """Time limit, as SLURM writes it (in quotes: "24:00:00", "2-00:00:00", "90"). A longer run is requeued."""
    partition: str | None = None
    """The cluster's default if left out."""
    account: str | None = None
    """Who is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    sbatch_options: tuple[str, ...] = ()
    """Further lines for sbatch, such as --exclusive or --mail-type=FAIL."""
    srun_options: tuple[str, ...] = ()
    """Further options of srun, such as --container-image=/images/rlhf.sqsh where the cluster has pyxis."""
    modules: tuple[str, ...] = ()
    """Loaded with "module load", in this order."""
    venv: Path | None = None
    """Virtual environment on a file system that all nodes see; the one that wrote the script if left out."""
    container: tuple[str, ...] = ()
    """Words in front of the command on every node, such as [apptainer, exec, --nv, /images/rlhf.sif]: what starts it
    inside of a container. The container brings its own Python, so venv is left out of use."""
    setup: tuple[str, ...] = ()
    """Further lines of shell before the run, in the job script."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the run, as they are: nothing in them is expanded. A job script that has any is for its
    owner's eyes only; for secrets take ``environment_files``."""
    environment_files: tuple[Path, ...] = ()
    """Files with lines NAME=VALUE, read when the job starts: tokens of trackers and hubs belong there."""
    interface: str | None = None
    """Network interface between nodes (ib0, eth0), for NCCL and gloo."""
    master_port: Annotated[int, Gt(1023)] | None = None
    """Where rank 0 listens; made from the job's number if left out, so that jobs on one node do not meet."""
    signal_lead_seconds: Annotated[int, Gt(0)] = 300
    """How long before the time limit a run is asked to save: longer than a step and a checkpoint take. SLURM may ask up
    to a minute earlier."""
    requeue: bool = True
    """Put a job that was stopped by a signal, or lost a node, back into the queue."""
    max_node_failures: Annotated[int, Ge(0)] = 3
    """How often a job that lost a node, or had one that is not fit, goes back into the queue."""
    probe_seconds: Annotated[int, Gt(0)] = 60
    """How long the nodes of a job that has failed may take to answer, until one of them counts as lost."""
    free_disk_gib: Annotated[float, Ge(0)] = 20.0
    """Refuse to start with less room than this, in GiB, in the run folder."""

    def __post_init__(self) -> None:
        seconds = self.time_seconds
        if self.signal_lead_seconds >= seconds:
            raise ValueError(
                f"signal_lead_seconds = {self.signal_lead_seconds} leaves nothing of time = {self.time} ({seconds} s); "
                "ask for more time, or set a shorter lead"
            )
        if self.container and self.venv:
            raise ValueError("venv and container exclude each other: the container brings its own Python")
        for option in (*self.sbatch_options, *self.srun_options):
            if not re.match(r"-{1,2}[A-Za-z]", option) or "\n" in option:
                raise ValueError(f"{option!r} is no option; expected something like --exclusive")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment.{name}: expected the name of an environment variable")
        literal = {f"environment.{name}": value for name, value in self.environment.items()}
        literal |= {"venv": str(self.venv or "")}
        literal |= {"environment_files": ":".join(map(str, self.environment_files))}
        for name, value in literal.items():
            if re.search(r"\$[A-Za-z_{(]", value):
                raise ValueError(
                    f"{name} = {value}: nothing is expanded there. ${{oc.env:HOME}} takes the value here, where the "
                    "script is written; a line of setup (export NAME=$HOME/x) takes that of the node"
                )

    @property
    def time_seconds(self) -> int:
        """The time limit in seconds."""
        return seconds_of(self.time)


def seconds_of(text: str) -> int:
    """A span of time as SLURM writes it.

    Raises:
        ValueError: if it is none.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f'time = {text}: expected "minutes", "hours:minutes:seconds" or "days-hours:minutes:seconds"')
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # days-hours, then minutes and seconds
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes, or minutes:seconds
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def stage_profile(profile: ClusterProfile, stage: PipelineStage) -> ClusterProfile:
    """What the job of a single stage asks for. One whose work a single process does needs no accelerator.

    Raises:
        ConfigError: if its time leaves nothing to work in.
    """
    asked = {"nodes": stage.nodes, "devices": stage.ranks, "time": stage.time}
    changed: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if stage.stage.alone:
        changed |= {"nodes": 1, "devices": 1, "device_kind": "cpu", "gpu_type": None}
    try:
        return replace(profile, **changed)
    except ValueError as error:
        raise ConfigError(f"stages.{stage.name}.time = {stage.time}: {error}") from None


def load_profile(paths: Sequence[Path], overrides: Sequence[str]) -> ClusterProfile:
    """Read cluster profiles, later ones winning.

    Args:
        paths: YAML files.
        overrides: ``key=value``.
    Raises:
        ConfigError: listing every problem.
    """
    # YAML takes 12:00:00 for a number to the base of 60; where a shell has taken the quotes away, they are put back.
    quoted = [re.sub(r"^time=([\d:-]+)$", r"time='\1'", override) for override in overrides]
    return load_config(ClusterProfile, paths, quoted, program="profile")
