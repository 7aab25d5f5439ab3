"""Stages as jobs: on this machine, on the nodes of an allocation, on hosts reached over ssh."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.jobs.allocation import HOSTFILE_VARIABLE, UnknownAllocation, allocated_hosts, is_here, node_address
from launch.jobs.devices import default_ranks, visible_gpus
from launch.jobs.hostfile import check_hosts
from launch.jobs.srun import SUPERVISOR, srun_command
from launch.stages import Stage
from rlhf.core.errors import ConfigError
from rlhf.core.ports import free_port

HERE = ""
"""Stands for this machine where nodes are named."""


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

    devices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Those of each node (:data:`HERE` for this machine) by their places among the visible ones; all if left out."""
    partial: bool = False
    """There are other devices on these nodes, which others may use meanwhile."""
    there: Mapping[str, int] = field(default_factory=dict)
    """How many the run has on each of these nodes in all, if that is more than :attr:`hosts` say."""
    cores: int | None = None
    """Cores of this machine for the work of CPUs; all if left out."""
    number: int = 0
    """Counts those that work at the same time, from 0: each has a port of its own."""
    elsewhere: bool = False
    """It begins with another node than the run, so MASTER_ADDR is not that of its rank 0."""

    @property
    def over_ssh(self) -> bool:
        """Whether what a stage starts on other nodes is out of reach of this machine's processes."""
        return bool(self.hosts) and not self.allocated

    @property
    def device_words(self) -> list[str]:
        """Options of the supervisor that leave the ranks those devices, if they are not all."""
        if not self.partial:
            return []
        return ["--devices", "/".join(",".join(map(str, places)) for places in self.devices.values())]


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
        return srun_command(
            command,
            hosts=machine.hosts,
            port=_port(machine),
            there=machine.there or machine.hosts,
            shared=machine.partial,
            address=node_address(next(iter(machine.hosts))) if machine.elsewhere else None,
            more=machine.device_words,
        )
    if machine.hosts:
        where = [*(("--address", "") if machine.elsewhere else ()), "--port", str(_port(machine))]
        over_ssh = [sys.executable, "-m", "launch.jobs.over_ssh", *where, *machine.device_words]
        return [*over_ssh, str(machine.hostfile), "--", *command]
    where = ["--address", "127.0.0.1", "--port", str(free_port())]
    # Always a free port: MASTER_PORT may be that of the run around this one.
    return [*SUPERVISOR, "--slots", str(_slots(stage, machine)), *machine.device_words, *where, "--", *command]


def stage_environment(stage: Stage, machine: Machine) -> dict[str, str]:
    """What the environment of a stage says of its share of the cores; what the user has set stays."""
    if machine.cores is None or machine.hosts or "OMP_NUM_THREADS" in os.environ:
        return {}
    ranks = 1 if stage.alone else _slots(stage, machine)
    return {"OMP_NUM_THREADS": str(max(1, machine.cores // ranks))}


def _slots(stage: Stage, machine: Machine) -> int:
    """Ranks on this machine. On CPUs the threads of one process do an evaluation as fast as ranks with a model each."""
    return machine.ranks or (default_ranks() if stage.trains else visible_gpus() or 1)


def _port(machine: Machine) -> int:
    """Where rank 0 of several nodes listens: MASTER_PORT if it is set, for firewalls; else one free on this node."""
    given = os.environ.get("MASTER_PORT")
    return int(given) + machine.number if given is not None else free_port()


class Job:
    """A command with its output added to a log. It ends with this object, and with this process, however that dies."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        """Start ``command`` with ``environment`` on top of that of this process."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._lifeline: int | None
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
        self.end()

    def let_go(self) -> None:
        """Tell what still runs to end, and do not wait for it."""
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                os.close(self._lifeline)
            self._lifeline = None

    def end(self) -> None:
        """End what still runs, and wait for that."""
        self.let_go()
        self._process.wait()
