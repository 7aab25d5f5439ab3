"""Starting one stage on all nodes of a SLURM allocation."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

import launch.jobs.supervisor

SUPERVISOR = [sys.executable, launch.jobs.supervisor.__file__]
"""The start of a command line of :mod:`launch.jobs.supervisor` in this very environment."""
SRUN_VARIABLE = "RLHF_SRUN_OPTIONS"
"""Environment variable by which a job script tells its pipeline of further options of srun."""
SECONDS_AFTER_FIRST = 60
"""How long nodes may go on after the first has ended: to publish, or to notice that another has crashed."""
SRUN_OPTIONS = (
    "--ntasks-per-node=1",  # the supervisor, which starts one rank for each device
    "--export=ALL",  # a cluster may have switched off what a job passes on
    "--cpu-bind=none",  # else all ranks of a node could end up on the core of the supervisor
    "--kill-on-bad-exit=0",  # a node that has saved and stopped must not be the end of one that is about to
    f"--wait={SECONDS_AFTER_FIRST}",
)


def srun_command(
    command: Sequence[str],
    *,
    hosts: Mapping[str, int],
    port: int,
    address: str | None = None,
    more: Sequence[str] = (),
    options: Sequence[str] = (),
) -> list[str]:
    """The command line that runs ``command`` on all ``hosts`` from inside an allocation, once for each device.

    Every node starts a supervisor, which SLURM tells the number of its node. Rank 0 is on the first node.

    Args:
        command: of every rank.
        hosts: ranks by node.
        port: where rank 0 listens.
        address: where the others reach the first node; MASTER_ADDR, or without that its name, if left out.
        more: further options of the supervisor.
        options: further options of srun.
    """
    where = ("--address", address or os.environ.get("MASTER_ADDR", next(iter(hosts))), "--port", str(port))
    step = step_words(SUPERVISOR, [*hosts.values()], command, *where, *more)
    given = (f"--nodelist={','.join(hosts)}", *options, *shlex.split(os.environ.get(SRUN_VARIABLE, "")))
    return [*srun_words(len(hosts), given), *step]


def srun_words(nodes: int, options: Sequence[str] = ()) -> list[str]:
    """srun with its options for one task on each of ``nodes``."""
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", *SRUN_OPTIONS, *options]


def step_words(supervisor: Sequence[str], slots: Sequence[int], command: Sequence[str], *more: str) -> list[str]:
    """What a node runs: ``command`` for each of its ranks; MASTER_ADDR and MASTER_PORT say where, or ``more``."""
    each = f"{slots[0]}x{len(slots)}" if len({*slots}) == 1 else ",".join(map(str, slots))
    return [*supervisor, "--slots", each, "--node", "slurm", *more, "--", *command]
