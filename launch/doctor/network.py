"""What is reached over the network: the hub, SLURM's controller, the nodes of a hostfile."""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.finding import Finding, Status
from launch.doctor.subject import Subject
from launch.jobs.hostfile import read_hostfile, unreachable_hosts
from rlhf.core.errors import ConfigError
from rlhf.core.paths import can_be_hub_name

HUB = "https://huggingface.co"
SECONDS = 5.0
"""How long the hub or SLURM may take to answer."""
_TRUE = ("1", "ON", "YES", "TRUE")


def hub(subject: Subject) -> Iterator[Finding]:
    """Whether models and data can be fetched by name, if that is wanted."""
    names = [name for name in _model_paths(subject) if not Path(name).expanduser().exists()]
    needed = f" ({', '.join(names)} are not folders here)" if names else ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        remedy = "download them first (hf download NAME) and keep the cache, or name folders"
        if names:
            yield Finding("warning", f"HF_HUB_OFFLINE is set{needed}: names must be in the cache", remedy)
        else:
            yield Finding("ok", "HF_HUB_OFFLINE is set: only folders and what is in the cache")
        return
    endpoint = os.environ.get("HF_ENDPOINT", HUB)
    fault = _http_fault(endpoint)
    if fault is None:
        yield Finding("ok", f"{endpoint} answers")
        return
    remedy = "set HTTPS_PROXY or HF_ENDPOINT; or, without a hub, HF_HUB_OFFLINE=1 and folders in the recipes"
    status: Status = "failure" if names else "warning"
    yield Finding(status, f"{endpoint} does not answer: {fault}{needed}", remedy)


def _http_fault(address: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", None) or error)
    return None


def _model_paths(subject: Subject) -> list[str]:
    """Paths of the models that no stage of the run makes and the hub could have, each once."""
    models = [role for stage in subject.trained for role in stage.models if role.hub and not role.inside]
    paths = dict.fromkeys(role.backbone.path for role in models)
    return [path for path in paths if can_be_hub_name(path) and not subject.will_make(path)]


def slurm(subject: Subject) -> Iterator[Finding]:
    """Whether there is a SLURM here that answers."""
    if shutil.which("sinfo") is None:
        yield Finding("ok", "none here (no sinfo); rlhf slurm render still writes job scripts")
        return
    command = ["sinfo", "--noheader", "--format=%P %D %t"]
    remedy = "see that slurmctld and munge run (scontrol ping; munge -n | unmunge), and SLURM_CONF"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("warning", f"sinfo gives no answer within {2 * SECONDS:g} s", remedy)
        return
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding("warning", f"sinfo does not answer: {said}", remedy)
        return
    rows = [line.split() for line in done.stdout.splitlines()]
    listed = "; ".join(f"{partition}: {count} {state}" for partition, count, state in rows) or "no partition"
    job = f", inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    yield Finding("ok", f"answers{job}; nodes by partition and state: {listed}")


def hostfile(subject: Subject) -> Iterator[Finding]:
    """Whether the hostfile can be read, and its nodes be reached as the launcher would reach them."""
    if subject.hostfile is None:
        return
    try:
        hosts = read_hostfile(subject.hostfile)
    except ConfigError as error:
        yield Finding("failure", str(error), "write a line 'HOST slots=DEVICES' for each node")
        return
    try:
        lost = unreachable_hosts(hosts)
    except ConfigError as error:
        yield Finding("failure", str(error), "install an ssh client (Debian, Ubuntu: openssh-client)")
        return
    for host, reason in lost.items():
        remedy = f"'ssh {host} true' must work without a password: ssh-copy-id {host}, or take the line out"
        yield Finding("failure", f"{host} cannot be reached over ssh: {reason}", remedy)
    if not lost:
        slots = sum(hosts.values())
        yield Finding("ok", f"{len(hosts)} node(s) with {slots} slot(s) in all, each answers over ssh")
