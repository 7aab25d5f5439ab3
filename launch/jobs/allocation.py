"""What the SLURM allocation around this process has."""

import contextlib
import os
import re
import socket
import subprocess
from pathlib import Path

from launch.jobs.hostfile import read_hostfile
from rlhf.core.errors import ConfigError

HOSTFILE_VARIABLE = "RLHF_HOSTFILE"
"""Environment variable by which a job script tells its pipeline of the hostfile."""
_NODES = re.compile(r"^ +Nodes=(\S+) .*?\bGRES=(\S*)", flags=re.MULTILINE)
_GPUS = re.compile(r"\bgpu(?::[^:,()]+)?:(\d+)(?=[(,]|$)")


class UnknownAllocation(ConfigError):
    """There is one, and SLURM does not say what it has."""


def allocated_hosts() -> dict[str, int] | None:
    """Devices by node of the SLURM allocation that this process runs in; ``None`` outside of one.

    The job script of ``rlhf slurm`` leaves a hostfile. Inside an allocation made by hand (salloc), nodes and devices
    are SLURM's: the GPUs that it has on each node, or one device where there are none.

    Raises:
        UnknownAllocation: if SLURM cannot be asked.
        ConfigError: if the hostfile is not there or does not have the nodes of the allocation, or if only some of the
            nodes have GPUs.
    """
    if "SLURM_JOB_NODELIST" not in os.environ:
        return None
    if HOSTFILE_VARIABLE not in os.environ:
        return _asked(os.environ["SLURM_JOB_NODELIST"], os.environ.get("SLURM_JOB_ID", ""))
    path = os.environ[HOSTFILE_VARIABLE]
    hosts, nodes = read_hostfile(Path(path)), os.environ.get("SLURM_JOB_NUM_NODES")
    if nodes is not None and len(hosts) != int(nodes):
        raise ConfigError(f"hostfile {path}: {len(hosts)} nodes, but the job has {nodes}; start the job script anew")
    return hosts


def is_here(node: str) -> bool:
    """Whether this process runs on that node of its allocation, and not where the allocation was asked for."""
    return node in (os.environ.get("SLURMD_NODENAME"), socket.gethostname(), socket.gethostname().partition(".")[0])


def node_address(node: str) -> str:
    """Where SLURM reaches a node; its name, where that cannot be asked."""
    with contextlib.suppress(UnknownAllocation):
        found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
        if found:
            return found[1]
    return node


def _asked(nodes: str, job: str) -> dict[str, int]:
    gpus: dict[str, int] = {}
    for names, resources in _NODES.findall(_scontrol("show", "job", "--details", job)):
        count = sum(map(int, _GPUS.findall(resources)))
        gpus |= dict.fromkeys(_scontrol("show", "hostnames", names).split(), count)
    hosts = _scontrol("show", "hostnames", nodes).split()
    if {*hosts} != {*gpus}:
        raise UnknownAllocation(
            f"SLURM job {job}: scontrol show job --details does not say what the nodes {nodes} have; give --hostfile, "
            "or --ranks to use this machine alone"
        )
    if not any(gpus.values()):
        return dict.fromkeys(hosts, 1)
    without = [host for host in hosts if not gpus[host]]
    if without:
        raise ConfigError(f"SLURM job {job}: {', '.join(without)} of {nodes} has no GPU; ask for nodes that all have")
    return {host: gpus[host] for host in hosts}


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnknownAllocation(
            "this is a SLURM allocation, and there is no scontrol here to ask what it has (inside of a container?); "
            "start the command outside, or give --ranks to use this machine alone"
        ) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UnknownAllocation(
            f"scontrol {' '.join(words)}: {said}; give --hostfile, or --ranks to use this machine alone"
        )
    return done.stdout
