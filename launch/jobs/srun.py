"""Starting one stage on all nodes of a SLURM allocation."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.jobs.hostfile import read_hostfile
from rlhf.core.errors import ConfigError

HOSTFILE_VARIABLE = "RLHF_HOSTFILE"
SRUN_VARIABLE = "RLHF_SRUN_OPTIONS"
"""Environment variables by which a job script tells its pipeline of the hostfile and of further options of srun."""
_STEP = Path(__file__).with_name("step.sh")
SECONDS_AFTER_FIRST = 60
"""How long nodes may go on after the first has ended: to publish, or to notice that another has crashed."""
SRUN_OPTIONS = (
    "--ntasks-per-node=1",  # the deepspeed launcher, which starts one rank for each device
    "--export=ALL",  # a cluster may have switched off what a job passes on
    "--cpu-bind=none",  # else all ranks of a node could end up on the core of the launcher
    "--kill-on-bad-exit=0",  # a node that has saved and stopped must not be the end of one that is about to
    f"--wait={SECONDS_AFTER_FIRST}",
)


def srun_command(
    module: str, arguments: Sequence[str], *, hosts: Mapping[str, int], master_port: int, hostfile: Path
) -> list[str]:
    """The command line that runs a stage on all ``hosts`` from inside an allocation, one rank for each device.

    Every node starts the deepspeed launcher with the node rank that SLURM gave it: neither ssh nor MPI is needed.
    Rank 0 is on the first node, reached by MASTER_ADDR or, without that, by the first name of the hostfile.

    Args:
        module: of the stage, such as ``policy.sft``.
        arguments: its command line.
        hosts: devices by node, as in the hostfile.
        master_port: where rank 0 listens.
        hostfile: of these hosts, on a file system that all nodes see.
    """
    step = step_command([str(_STEP)], str(hostfile), str(master_port), [module, *arguments])
    return [*srun_words(len(hosts), shlex.split(os.environ.get(SRUN_VARIABLE, ""))), *step]


def srun_words(nodes: int, options: Sequence[str] = ()) -> list[str]:
    """srun with its options for one task on each of ``nodes``."""
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", *SRUN_OPTIONS, *options]


def step_command(
    script: Sequence[str], hostfile: str, port: str, module: Sequence[str], container: Sequence[str] = ()
) -> list[str]:
    """What a node runs: ``script``, words that give bash the text of :func:`step_script`, with its arguments."""
    return ["bash", *script, hostfile, port, *container, "deepspeed", "--", *module]


def step_script() -> str:
    """What runs on every node. It holds no single quote."""
    return _STEP.read_text(encoding="utf-8")


def allocated_hosts() -> dict[str, int] | None:
    """Devices by node of the SLURM allocation that this process runs in; ``None`` outside of one.

    The job script of ``rlhf slurm`` leaves a hostfile. Inside an allocation made by hand (salloc), nodes and devices
    are SLURM's: GPUs of each node, or one device where there are none.

    Raises:
        ConfigError: if the hostfile is not there, or does not have the nodes of the allocation.
    """
    if "SLURM_JOB_NODELIST" not in os.environ:
        return None
    if HOSTFILE_VARIABLE not in os.environ:
        names = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        found = subprocess.run(names, capture_output=True, text=True, check=True)
        return dict.fromkeys(found.stdout.split(), int(os.environ.get("SLURM_GPUS_ON_NODE", "1")))
    path = os.environ[HOSTFILE_VARIABLE]
    hosts, nodes = read_hostfile(Path(path)), os.environ.get("SLURM_JOB_NUM_NODES")
    if nodes is not None and len(hosts) != int(nodes):
        raise ConfigError(f"hostfile {path}: {len(hosts)} nodes, but the job has {nodes}; start the job script anew")
    return hosts
