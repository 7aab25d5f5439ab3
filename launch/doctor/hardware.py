"""Devices, host memory, shared memory and disk."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.doctor.finding import GIB, Finding, PlannedStage, Subject, gibibytes
from launch.doctor.placements import placements, resolved
from rlhf.core.errors import ConfigError
from rlhf.core.memory import host_memory as read_memory

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = GIB // 2
"""Below this NCCL and data loaders run out of it (Docker's default is 64 MiB)."""
LEAST_DISK, LOW_DISK = GIB, 20 * GIB
"""Without a recipe to go by: too little for anything, and little for checkpoints of a real model."""
LOW_MEMORY = 4 * GIB
STATE_BYTES = 16
"""Bytes a trained parameter in a checkpoint, at most: weights, float32 copy and two moments."""
SOME_ROWS, SOME_TOKENS = 10_000, 500.0
"""Data that a plan is made for where only the size of files is asked: they hardly depend on it."""
BUSY_SHARE = 0.1
"""Of a GPU's memory: more than this in use before the run starts is somebody else's."""


# ---- devices


def devices(subject: Subject) -> Iterator[Finding]:
    """GPUs as torch sees them, against what is in the machine and how many ranks are to run."""
    import torch

    present = _listed_gpus()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        yield from _gpus(count, present, subject)
    elif present and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides the {len(present)} GPU(s)"
        yield Finding("devices", "warning", hidden, "unset CUDA_VISIBLE_DEVICES, unless the run is to use the CPU")
    elif present:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
        text = f"{len(present)} GPU(s) are here, torch sees none: torch {torch.__version__} is built for {build}"
        remedy = "install a torch build for the driver's CUDA version (nvidia-smi shows it), or update the driver"
        yield Finding("devices", "failure", text, remedy)
    else:
        yield _cores(subject)


def _gpus(count: int, present: list[dict[str, Any]], subject: Subject) -> Iterator[Finding]:
    if subject.ranks is not None and subject.ranks > count:
        text = f"{subject.ranks} ranks for {count} GPU(s): one GPU takes one rank"
        yield Finding("devices", "failure", text, f"--ranks {count}")
        return
    for gpu in _visible(present):
        if gpu["used"] > BUSY_SHARE * gpu["total"]:
            busy = f"GPU {gpu['index']}: {gibibytes(gpu['used'])} of {gibibytes(gpu['total'])} are in use already"
            yield Finding("devices", "warning", busy, "end the processes that nvidia-smi shows, or choose other GPUs")
    names = {gpu["name"]: gibibytes(gpu["total"]) for gpu in present}
    kinds = ", ".join(f"{name} ({size})" for name, size in names.items()) or "of a kind that nvidia-smi does not list"
    yield Finding("devices", "ok", f"{count} GPU(s): {kinds}", values={"gpus": count})


def _cores(subject: Subject) -> Finding:
    cores = len(os.sched_getaffinity(0))
    if subject.ranks is not None and subject.ranks > cores:
        text = f"no GPU, and {subject.ranks} ranks for {cores} CPU core(s): they will wait for each other"
        return Finding("devices", "warning", text, f"--ranks {cores}")
    return Finding("devices", "ok", f"no GPU; {cores} CPU core(s), float32 over gloo", values={"gpus": 0})


def _listed_gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs of the machine with their memory in bytes, without taking any of it."""
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        index, name, *sizes = (part.strip() for part in line.split(","))
        total, used = (int(size) * 2**20 if size.isdigit() else 0 for size in sizes)
        found.append({"index": index, "name": name, "total": total, "used": used})
    return found


def _visible(present: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if chosen is None else [gpu for gpu in present if gpu["index"] in chosen.split(",")]


# ---- host memory


def host_memory(subject: Subject) -> Iterator[Finding]:
    """Memory that is free on this host or in its container, against what loading and offload take."""
    memory = read_memory()
    if memory is None:
        yield Finding("host memory", "warning", "not known: no /proc/meminfo", "a Linux host tells how much is free")
        return
    free = memory.free
    where = "up to the limit of this container or job" if memory.limited else "of this host"
    text = f"{gibibytes(free)} free, {where} ({gibibytes(memory.total)} in all)"
    needs = [_host_bytes(stage, subject) for stage in subject.trained]
    need, reason = max(needs, default=(0, ""))
    values = {"free_bytes": free, "needed_bytes": need}
    if need > free:
        remedy = "fewer ranks on this host, a host with more memory, or a configuration that offloads less"
        text = f"{text}, but {reason} take {gibibytes(need)}: the system would kill the run (exit code -9)"
        yield Finding("host memory", "failure", text, remedy, values)
    elif not need and free < LOW_MEMORY:
        remedy = "end other processes, or raise the limit of the container"
        yield Finding("host memory", "warning", text, remedy, values)
    else:
        yield Finding("host memory", "ok", text + (f"; {reason} take {gibibytes(need)}" if need else ""), values=values)


def _host_bytes(stage: PlannedStage, subject: Subject) -> tuple[int, str]:
    """Bytes on this host that the ranks need to load the model, or to hold what is offloaded; and which."""
    from rlhf.engine.build import DTYPES, precision_of

    config, (_, ranks) = stage.config, subject.world(stage)
    size = DTYPES[precision_of(config.engine)].itemsize
    parameters = _parameters(stage, subject)
    loading = parameters * size * ranks
    try:
        zero = resolved(next(placements(stage)), stage, subject).get("zero_optimization", {})
    except ConfigError:
        zero = {}  # the check of the ops says so
    per_parameter = 0
    if (zero.get("offload_optimizer") or {}).get("device") == "cpu" and _trains_all(config):
        per_parameter += 12
    if (zero.get("offload_param") or {}).get("device") in ("cpu", "nvme"):
        per_parameter += size
    offloaded = parameters * per_parameter
    return max((loading, f"{ranks} rank(s) that load the model"), (offloaded, "offloaded states"))


# ---- shared memory and disk


def shared_memory(subject: Subject) -> Iterator[Finding]:
    """Where NCCL and data loaders pass things between the processes of a host."""
    remedy = "in a container: docker run --shm-size=1g (or --ipc=host); else mount -o remount,size=1g /dev/shm"
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        yield Finding("shared memory", "warning", f"{SHARED_MEMORY}: {error.strerror}", remedy)
        return
    text = f"{gibibytes(free)} free in {SHARED_MEMORY}"
    if free < LEAST_SHARED:
        text += f": less than {gibibytes(LEAST_SHARED)}, NCCL may end with a bus error"
        yield Finding("shared memory", "warning", text, remedy)
    else:
        yield Finding("shared memory", "ok", text)


def disk(subject: Subject) -> Iterator[Finding]:
    """Room and rights where the run writes."""
    folders = {subject.output: [*subject.trained]}
    for stage in subject.trained:
        path = stage.config.engine.nvme_path
        if path is not None:
            folders.setdefault(Path(path), [])
    for folder, stages in folders.items():
        yield _room(folder, stages, subject)


def _room(folder: Path, stages: list[PlannedStage], subject: Subject) -> Finding:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    need = sum(_disk_bytes(stage, subject) for stage in stages)
    usage = shutil.disk_usage(place)
    text = f"{gibibytes(usage.free)} free for {folder}"
    values = {"free_bytes": usage.free, "needed_bytes": need}
    fault = _write_fault(place)
    if fault is not None:
        remedy = "choose another output=FOLDER, or mend its rights, quota or mount"
        return Finding("disk", "failure", f"{folder}: cannot be written to: {fault}", remedy, values)
    remedy = "free some, choose another output=FOLDER, or lower train.keep_checkpoints"
    if need:
        text += f"; checkpoints and weights take about {gibibytes(need)}"
    if usage.free < (need or LEAST_DISK):
        return Finding("disk", "failure", f"{text}: not enough", remedy, values)
    if not need and usage.free < LOW_DISK:
        return Finding("disk", "warning", f"{text}: little for checkpoints of a large model", remedy, values)
    return Finding("disk", "ok", text, values=values)


def _write_fault(place: Path) -> str | None:
    """Why a small file cannot be written there: rights, quota, a full or read-only disk."""
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as handle:
            handle.write(bytes(2**20))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _disk_bytes(stage: PlannedStage, subject: Subject) -> int:
    """Checkpoints, published weights and caches, as :mod:`launch.plan` counts them, less what is there already.

    A shape that no plan knows (or code of the model's own) is counted from its files; 0 if there are none.
    """
    from launch.plan.cluster import cluster_of
    from launch.plan.planner import Request, disk, plan_stage

    _, ranks = subject.world(stage)
    here = cluster_of(nodes=max(len(subject.hosts), 1), devices_per_node=ranks)
    request = Request(sources=subject.sources, rows=SOME_ROWS, mean_tokens=SOME_TOKENS)
    try:
        need = sum(disk(plan_stage(stage.kind, stage.config, here, request)).values())
    except Exception:
        parameters, copies = _parameters(stage, subject), stage.config.train.keep_checkpoints + 1
        need = parameters * (4 + (STATE_BYTES * copies if _trains_all(stage.config) else 0))
    present = sum(path.stat().st_size for path in stage.config.output.rglob("*") if path.is_file())
    return max(0, need - present)


def _parameters(stage: PlannedStage, subject: Subject) -> int:
    """Of the model that a stage starts from, also if another stage has yet to make it; 0 if nobody knows its shape."""
    import torch

    from launch.plan.models import empty_model
    from launch.stages import model_of
    from rlhf.models.backbones import checkpoint_bytes

    section, name = model_of(stage.config)
    folder = Path(section.path).expanduser()
    if folder.is_dir():
        return checkpoint_bytes(folder, torch.uint8) or 0
    kind = "reward model" if stage.kind == "reward" else "language model"
    try:
        return empty_model(section, kind, sources=subject.sources, setting=f"{name}.path").total
    except Exception:
        return 0


def _trains_all(config: Any) -> bool:
    from launch.stages import model_of

    return model_of(config)[0].lora is None
