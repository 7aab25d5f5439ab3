"""Starting one stage on all nodes of a SLURM allocation."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

import launch.jobs.supervisor
from launch.jobs.asked_step import STEPS_VARIABLE, asked_step, container_words

SUPERVISOR = [sys.executable, launch.jobs.supervisor.__file__]
"""The start of a command line of :mod:`launch.jobs.supervisor` in this very environment."""
SRUN_VARIABLE = "RLHF_SRUN_OPTIONS"
"""Environment variable by which a job script tells its pipeline of further options of srun."""
SECONDS_AFTER_FIRST = 60
"""How long nodes may go on after the first has ended: to publish, or to notice that another has crashed."""
ASKED_OTHERWISE = (
    *("SLURM_GPUS", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_SOCKET", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK"),
    "SLURM_GPU_BIND",
)
"""Environment variables of an allocation whose GPUs were asked for by task, by socket or in all: srun would ask for
those of its own tasks, one a node, or for all in a step of some nodes."""
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
    there: Mapping[str, int],
    shared: bool = False,
    address: str | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line that runs ``command`` on all ``hosts`` from inside an allocation, once for each device.

    Every node starts a supervisor, which SLURM tells the number of its node. Rank 0 is on the first node.

    Args:
        command: of every rank.
        hosts: ranks by node.
        port: where rank 0 listens.
        there: devices that the allocation has on these nodes.
        shared: other steps may use these nodes at the same time.
        address: where the others reach the first node; MASTER_ADDR, or without that its name, if left out.
        more: further options of the supervisor.
    """
    where = ("--address", address or os.environ.get("MASTER_ADDR", next(iter(hosts))), "--port", str(port))
    inside = container_words()
    supervisor = [*inside, sys.executable, "-m", "launch.jobs.supervisor"] if inside else SUPERVISOR
    step = step_words(supervisor, [*hosts.values()], command, *where, *more)
    plain, asking = _all_gpus([*there.values()], shared)
    given = [f"--nodelist={','.join(hosts)}", *asking, *shlex.split(os.environ.get(SRUN_VARIABLE, ""))]
    words = [*plain, *srun_words(len(hosts), given), *step]
    return asked_step(words) if STEPS_VARIABLE in os.environ else words


def _all_gpus(counts: Sequence[int], shared: bool) -> tuple[list[str], list[str]]:
    """Words before srun, and options of it, by which a step has all GPUs that the allocation has on its nodes."""
    asked = [name for name in ASKED_OTHERWISE if name in os.environ]
    overlap = ["--overlap"] if shared else []
    if not asked:
        return [], overlap
    plain = ["env", *(f"--unset={name}" for name in asked)]
    if len({*counts}) == 1 and "SLURM_GPUS" not in asked:
        return plain, [f"--gpus-per-node={counts[0]}", *overlap]
    # Of several nodes overlapping steps are given fewer: such a step does without, and waits until it is alone.
    return plain, [f"--gpus={sum(counts)}", *(overlap if len(counts) == 1 else ())]


def srun_words(nodes: int, options: Sequence[str] = ()) -> list[str]:
    """srun with its options for one task on each of ``nodes``."""
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", *SRUN_OPTIONS, *options]


def step_words(supervisor: Sequence[str], slots: Sequence[int], command: Sequence[str], *more: str) -> list[str]:
    """What a node runs: ``command`` for each of its ranks; MASTER_ADDR and MASTER_PORT say where, or ``more``."""
    each = f"{slots[0]}x{len(slots)}" if len({*slots}) == 1 else ",".join(map(str, slots))
    return [*supervisor, "--slots", each, "--node", "slurm", *more, "--", *command]
