"""Stages as jobs: on this machine, on the nodes of an allocation, on hosts reached over ssh."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.jobs.allocation import HOSTFILE_VARIABLE, UnknownAllocation, allocated_hosts, is_here
from launch.jobs.devices import default_ranks, visible_gpus
from launch.jobs.hostfile import check_hosts
from launch.jobs.srun import SUPERVISOR, srun_command
from launch.runs import PipelineStage
from launch.stages import Stage
from rlhf.core.errors import ConfigError
from rlhf.core.ports import free_port


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where stages run."""

    ranks: int | None = None
    """Processes, if there is one node; :func:`default_ranks` if left out."""
    hosts: Mapping[str, int] = field(default_factory=dict)
    """Devices by node, if there are several."""
    hostfile: Path | None = None
    """The file that names them, if they are reached over ssh."""
    allocated: bool = False
    """They are those of the SLURM allocation around this process, else reached over ssh."""

    @property
    def over_ssh(self) -> bool:
        """Whether what a stage starts on other nodes is out of reach of this machine's processes."""
        return bool(self.hosts) and not self.allocated

    def part_for(self, stage: PipelineStage) -> "Machine":
        """What ``stage`` uses of it.

        Raises:
            ConfigError: if it asks for more than there is.
        """
        if self.hosts:
            return replace(self, hosts=stage.share(self.hosts))
        if stage.nodes is not None and stage.nodes > 1:
            raise ConfigError(f"stages.{stage.name}.nodes = {stage.nodes}: the run has 1; ask for no more")
        gpus = visible_gpus() if stage.ranks is not None else 0
        if stage.ranks is not None and gpus and stage.ranks > gpus:
            raise ConfigError(f"stages.{stage.name}.ranks = {stage.ranks}: {gpus} GPUs are visible; ask for no more")
        return self if stage.ranks is None else replace(self, ranks=stage.ranks)


def find_machine(ranks: int | None, hostfile: Path | None) -> Machine:
    """The nodes of ``hostfile``, else those of the SLURM allocation around this process, else this machine.

    Raises:
        ConfigError: if the hostfile is faulty, a node in it cannot be reached, it cannot be found out what the
            allocation has, or ``ranks`` are given that several nodes have no use for.
    """
    if hostfile is not None:
        if ranks is not None:
            raise ConfigError(f"--ranks {ranks}: the hostfile {hostfile} says how many each host has; leave one out")
        return Machine(hosts=check_hosts(hostfile), hostfile=hostfile)
    try:
        hosts = allocated_hosts()
    except UnknownAllocation:
        if ranks is None:
            raise
        return Machine(ranks=ranks)
    if not hosts or (len(hosts) == 1 and HOSTFILE_VARIABLE not in os.environ and is_here(next(iter(hosts)))):
        return Machine(ranks=ranks)
    if ranks is not None and len(hosts) > 1:
        has = ", ".join(f"{host} {count}" for host, count in hosts.items())
        raise ConfigError(f"--ranks {ranks}: the ranks of the allocation are its devices ({has}); leave it out")
    if ranks is not None:
        hosts = dict.fromkeys(hosts, ranks)
    return Machine(hosts=hosts, allocated=True)


def stage_command(stage: Stage, arguments: Sequence[str], machine: Machine) -> list[str]:
    """The command that starts a stage on all ranks, or alone if a single process does its work."""
    command = [sys.executable, "-m", stage.module, *arguments]
    if stage.alone:
        return command
    if machine.allocated:
        return srun_command(command, hosts=machine.hosts, port=_port())
    if machine.hosts:
        return [sys.executable, "-m", "launch.jobs.over_ssh", str(machine.hostfile), str(_port()), "--", *command]
    # On CPUs the threads of one process do an evaluation as fast as ranks with a model each.
    slots = str(machine.ranks or (default_ranks() if stage.trains else visible_gpus() or 1))
    # Always a free port: MASTER_PORT may be that of the run around this one.
    return [*SUPERVISOR, "--slots", slots, "--address", "127.0.0.1", "--port", str(free_port()), "--", *command]


def _port() -> int:
    """Where rank 0 of several nodes listens: MASTER_PORT if it is set, for firewalls; else one free on this node."""
    return int(os.environ.get("MASTER_PORT", free_port()))


class Job:
    """A command with its output added to a log. It ends with this object, and with this process, however that dies."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        """Start ``command`` with ``environment`` on top of that of this process."""
        log.parent.mkdir(parents=True, exist_ok=True)
        reading, self._lifeline = os.pipe()
        own = [*SUPERVISOR, "--lifeline", str(reading)]
        supervised = command[len(SUPERVISOR) :] if [*command[: len(SUPERVISOR)]] == SUPERVISOR else ["--", *command]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*own, *supervised],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(reading,),
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            )
        os.close(reading)

    def wait(self, seconds: float) -> int | None:
        """The exit code, 128 and more for a signal; ``None`` if the job still runs after ``seconds``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=seconds)
        return None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        """End what still runs, and wait for that."""
        with contextlib.suppress(OSError):
            os.close(self._lifeline)
        self._process.wait()
