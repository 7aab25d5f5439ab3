"""Training jobs under the deepspeed launcher of this very environment."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import launch.jobs.guard
from launch.jobs.devices import default_ranks
from launch.jobs.hostfile import check_hosts, write_hostfile
from launch.jobs.srun import HOSTFILE_VARIABLE, allocated_hosts, srun_command
from launch.stages import Stage
from rlhf.core.ports import free_port


def launcher(ranks: int) -> list[str]:
    """The start of a command line, on a port that no other run has."""
    return [deepspeed_program(), "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def deepspeed_program() -> str:
    return str(Path(sys.executable).with_name("deepspeed"))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where stages run."""

    ranks: int | None = None
    """Processes, if there is one node; :func:`default_ranks` if left out."""
    hosts: Mapping[str, int] = field(default_factory=dict)
    """Devices by node, if there are several."""
    hostfile: Path | None = None
    """The same as a file."""
    allocated: bool = False
    """They are those of the SLURM allocation around this process, else reached over ssh."""

    @property
    def over_ssh(self) -> bool:
        """Whether what a stage starts on other nodes is out of reach of this machine's processes."""
        return bool(self.hosts) and not self.allocated

    def with_ranks(self, ranks: int | None) -> "Machine":
        return self if ranks is None else replace(self, ranks=ranks)


def find_machine(ranks: int | None, hostfile: Path | None, folder: Path) -> Machine:
    """The nodes of ``hostfile``, else those of the SLURM allocation around this process, else this machine.

    Args:
        folder: for the hostfile of an allocation, on a file system that all nodes see.
    Raises:
        ConfigError: if the hostfile is faulty, or a node in it cannot be reached. DeepSpeed itself would go on with
            this machine alone.
    """
    if hostfile is not None:
        return Machine(hosts=check_hosts(hostfile), hostfile=hostfile)
    hosts = allocated_hosts() or {}
    if not hosts or (len(hosts) == 1 and HOSTFILE_VARIABLE not in os.environ):
        return Machine(ranks=ranks)
    path = Path(os.environ.get(HOSTFILE_VARIABLE, folder / "hostfile"))
    if HOSTFILE_VARIABLE not in os.environ:
        write_hostfile(path, hosts)
    return Machine(hosts=hosts, hostfile=path, allocated=True)


def stage_command(stage: Stage, arguments: Sequence[str], machine: Machine) -> list[str]:
    """The command that starts a stage: under the launcher on all ranks, or by itself if it does not train."""
    if not stage.trains:
        return [sys.executable, "-m", stage.module, *arguments]
    if machine.allocated:
        assert machine.hostfile is not None
        return srun_command(
            stage.module, arguments, hosts=machine.hosts, master_port=_master_port(), hostfile=machine.hostfile
        )
    if machine.hosts:
        head = [deepspeed_program(), "--hostfile", str(machine.hostfile), "--master_port", str(_master_port())]
        if "MASTER_ADDR" in os.environ:  # else deepspeed asks the first host for its addresses
            head += ["--master_addr", os.environ["MASTER_ADDR"]]
        return [*head, "--module", stage.module, *arguments]
    return [*launcher(machine.ranks or default_ranks()), "--module", stage.module, *arguments]


def _master_port() -> int:
    """Where rank 0 of several nodes listens: MASTER_PORT if it is set, for firewalls; else one free on this node."""
    return int(os.environ.get("MASTER_PORT", free_port()))


class Job:
    """A command with its output added to a log. It ends with this object, and with this process, however that dies."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        """Start ``command`` with ``environment`` on top of that of this process."""
        log.parent.mkdir(parents=True, exist_ok=True)
        reading, self._lifeline = os.pipe()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, launch.jobs.guard.__file__, str(reading), *command],
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
