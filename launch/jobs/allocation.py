"""What the SLURM allocation around this process has."""

import contextlib
import itertools
import os
import re
import shutil
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
    are SLURM's: the GPUs that it has on each node, or one device where there are none. Where SLURM's commands are
    missing, as inside of a container, its environment variables say it, as far as they do.

    Raises:
        UnknownAllocation: if SLURM cannot be asked, or its nodes cannot be reached.
        ConfigError: if the hostfile is not there or does not have the nodes of the allocation, or if only some of the
            nodes have GPUs.
    """
    if "SLURM_JOB_NODELIST" not in os.environ:
        return None
    names, job = os.environ["SLURM_JOB_NODELIST"], os.environ.get("SLURM_JOB_ID", "")
    if HOSTFILE_VARIABLE not in os.environ:
        hosts = _asked(names, job) if shutil.which("scontrol") else _told(names, job)
        if not (len(hosts) == 1 and is_here(next(iter(hosts)))) and shutil.which("srun") is None:
            raise UnknownAllocation(
                f"SLURM job {job}: its nodes {names} are reached by srun, and there is none here (inside of a "
                "container?); start the command outside, submit it with rlhf slurm and a profile that names the "
                "container, or give --ranks to use this machine alone"
            )
        return hosts
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


def node_names(text: str) -> list[str]:
    """The nodes that SLURM writes as ``node[001-003,7],login1,rack[1-2]n[1-2]``.

    Raises:
        ValueError: if it is no such list.
    """
    names = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        pieces = [_numbers(piece) if piece[0] == "[" else [piece] for piece in re.findall(r"\[[^\]]*\]|[^\[\]]+", part)]
        names += ["".join(chosen) for chosen in itertools.product(*pieces)]
    return names


def _numbers(text: str) -> list[str]:
    """``[001-003,7]`` with the zeros in front."""
    found = []
    for span in text[1:-1].split(","):
        first, _, last = span.partition("-")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return found


def _count(text: str) -> int:
    """``4``, ``h100:4`` or ``h100:4,a100:2``."""
    return sum(int(part.rpartition(":")[2]) for part in text.split(","))


def _told(nodes: str, job: str) -> dict[str, int]:
    """What the environment says of the nodes, where nobody can be asked."""
    hosts, told = node_names(nodes), os.environ
    counts: list[int] | None = None
    if "SLURM_GPUS_PER_NODE" in told:
        counts = [_count(told["SLURM_GPUS_PER_NODE"])] * len(hosts)
    elif "SLURM_GPUS_PER_TASK" in told and "SLURM_TASKS_PER_NODE" in told:
        each = _count(told["SLURM_GPUS_PER_TASK"])
        spans = re.findall(r"(\d+)(?:\(x(\d+)\))?", told["SLURM_TASKS_PER_NODE"])
        counts = [each * int(tasks) for tasks, times in spans for _ in range(int(times or 1))]
    elif "SLURM_GPUS" not in told or len(hosts) == 1:  # else nodes may have unequal numbers
        if "SLURM_GPUS_ON_NODE" in told:
            counts = [int(told["SLURM_GPUS_ON_NODE"])] * len(hosts)
        elif "SLURMD_NODENAME" in told or len(hosts) == 1:  # on a node, SLURM would have said that there are some
            counts = [1] * len(hosts)
    if counts is None or len(counts) != len(hosts):
        raise UnknownAllocation(
            f"SLURM job {job}: there is no scontrol here to ask what its nodes {nodes} have (inside of a container?), "
            "and the environment does not say it; start the command outside, or give --ranks to use this machine alone"
        )
    return dict(zip(hosts, counts, strict=True))


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
        raise UnknownAllocation("there is no scontrol here") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UnknownAllocation(
            f"scontrol {' '.join(words)}: {said}; give --hostfile, or --ranks to use this machine alone"
        )
    return done.stdout
