"""An all-reduce over ranks that are started as a stage would be."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.finding import Finding
from launch.doctor.subject import Subject
from launch.jobs.hostfile import read_hostfile, unreachable_hosts
from launch.jobs.launcher import Job, Machine, find_machine, stage_command
from launch.stages import Stage
from rlhf.core.errors import ConfigError

MODULE = Stage(name="all-reduce", module="rlhf.engine.bandwidth", config="rlhf.engine.bandwidth:Bandwidth")
_REMEDY = {
    "nccl": "NCCL_DEBUG=INFO says more; between nodes name the network: NCCL_SOCKET_IFNAME=eth0 (ip addr lists them)",
    "gloo": "name the network interface: GLOO_SOCKET_IFNAME=eth0 (ip addr lists them); see that no firewall is between",
}
_TAIL_LINES = 3


def all_reduce(subject: Subject) -> Iterator[Finding]:
    """Start all ranks, let them add up a tensor, and time it."""
    if subject.hostfile is not None and not _is_usable(subject.hostfile):
        text = "not tried: the nodes of the hostfile cannot be used"
        yield Finding("warning", text, "see the check of the hostfile")
        return
    # Beside the run, for all nodes must see the hostfile that is made of an allocation.
    output = subject.output.absolute()
    place = next(path for path in (output, *output.parents) if path.exists())
    try:
        made = tempfile.TemporaryDirectory(prefix=".doctor-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        text = f"not tried: {place} cannot be written to: {error.strerror}"
        yield Finding("warning", text, "see the check of the disk")
        return
    with made as folder:
        try:
            yield _tried(subject, Path(folder))
        except ConfigError as error:
            yield Finding("failure", str(error), "see the options of this command")


def _tried(subject: Subject, folder: Path) -> Finding:
    import torch

    log, result = folder / "ranks.log", folder / "measured.json"
    machine = find_machine(subject.ranks, subject.hostfile)
    code = _run(stage_command(MODULE, [str(result.absolute())], machine), log, subject.seconds)
    if code is not None and result.is_file():
        return _judged(json.loads(result.read_text()), machine)
    late = f"the ranks did not meet within {subject.seconds:g} s"
    outcome = late if code is None else f"the launcher ended with exit code {code}"
    remedy = _REMEDY["nccl" if torch.cuda.is_available() else "gloo"]
    return Finding("failure", f"{outcome}; the ranks said: {_tail(log)}", remedy)


def _is_usable(hostfile: Path) -> bool:
    try:
        return not unreachable_hosts(read_hostfile(hostfile))
    except ConfigError:
        return False


def _run(command: list[str], log: Path, seconds: float) -> int | None:
    """Wait for ``command``; its exit code, ``None`` if it took too long."""
    deadline = time.monotonic() + seconds
    with Job(command, log) as job:
        while time.monotonic() < deadline:
            code = job.wait(0.5)
            if code is not None:
                return code
    return None


def _judged(measured: dict, machine: Machine) -> Finding:
    ranks, nodes, backend = measured["ranks"], measured["nodes"], measured["backend"]
    text = (
        f"{ranks} rank(s) on {nodes} node(s) over {backend}: {measured['bus_gb_per_second']:.2f} GB/s "
        f"({measured['bytes'] / 2**20:.0f} MiB in {1000 * measured['seconds']:.1f} ms), "
        f"{1e6 * measured['latency_seconds']:.0f} us for a single number"
    )
    wanted = len(machine.hosts) or 1
    if not measured["correct"]:
        remedy = "a fault of network or memory: leave out nodes one by one until it is gone"
        return Finding("failure", f"the sum is wrong: {text}", remedy, measured)
    if nodes < wanted:
        remedy = "see that host names differ and that the launcher starts all nodes"
        return Finding("failure", f"only {nodes} of {wanted} nodes took part: {text}", remedy, measured)
    if ranks == 1:
        text = "one rank: nothing to reduce with"
    return Finding("ok", text, values=measured)


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_TAIL_LINES:]) or "nothing"
