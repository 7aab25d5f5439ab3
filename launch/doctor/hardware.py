"""Devices, memory and disk of this machine, against what the plan of each stage says."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.doctor.finding import Finding
from launch.doctor.subject import Subject
from launch.runs import PipelineStage
from launch.screen import GIB, gib
from rlhf.core.memory import host_memory as read_memory

if TYPE_CHECKING:
    from launch.plan.planner import StagePlan

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = GIB // 2
"""Shared memory in bytes that NCCL and data loaders run out of below (Docker's default is 64 MiB)."""
LEAST_DISK, LOW_DISK = GIB, 20 * GIB
"""Free disk, without a recipe to go by, that is too little for anything, and little for checkpoints of a real model."""
LOW_MEMORY = 4 * GIB
BUSY_SHARE = 0.1
"""Share of a GPU's memory that may be in use before the run starts; more than this is somebody else's."""


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
        yield Finding("warning", hidden, "unset CUDA_VISIBLE_DEVICES, unless the run is to use the CPU")
    elif present:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
        text = f"{len(present)} GPU(s) are here, torch sees none: torch {torch.__version__} is built for {build}"
        remedy = "install a torch build for the driver's CUDA version (nvidia-smi shows it), or update the driver"
        yield Finding("failure", text, remedy)
    else:
        yield _cores(subject)


def _gpus(count: int, present: list[dict[str, Any]], subject: Subject) -> Iterator[Finding]:
    if subject.ranks is not None and subject.ranks > count:
        text = f"{subject.ranks} ranks for {count} GPU(s): one GPU takes one rank"
        yield Finding("failure", text, f"--ranks {count}")
        return
    visible = _visible(present)
    for gpu in visible:
        if gpu["used"] > BUSY_SHARE * gpu["total"]:
            busy = f"GPU {gpu['index']}: {gib(gpu['used'])} of {gib(gpu['total'])} are in use already"
            yield Finding("warning", busy, "end the processes that nvidia-smi shows, or choose other GPUs")
    names = {gpu["name"]: gib(gpu["total"]) for gpu in visible}
    kinds = ", ".join(f"{name} ({size})" for name, size in names.items()) or "of a kind that nvidia-smi does not list"
    yield Finding("ok", f"{count} GPU(s): {kinds}", values={"gpus": count})


def _cores(subject: Subject) -> Finding:
    cores = len(os.sched_getaffinity(0))
    if subject.ranks is not None and subject.ranks > cores:
        text = f"no GPU, and {subject.ranks} ranks for {cores} CPU core(s): they will wait for each other"
        return Finding("warning", text, f"--ranks {cores}")
    return Finding("ok", f"no GPU; {cores} CPU core(s), float32 over gloo", values={"gpus": 0})


def _listed_gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs of the machine with their memory in bytes, without taking any of it."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        index, uuid, name, *sizes = (part.strip() for part in line.split(","))
        total, used = (int(size) * 2**20 if size.isdigit() else 0 for size in sizes)
        found.append({"index": index, "uuid": uuid, "name": name, "total": total, "used": used})
    return found


def _visible(present: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``present`` that CUDA shows: by index, by the beginning of a UUID, by the GPU that a MIG slice is of.

    A slice that is named by a UUID of its own is not in the list of nvidia-smi. As CUDA does, this reads up to the
    first name that means nothing.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    found = []
    for word in map(str.strip, chosen.split(",")):
        whole = word.removeprefix("MIG-").partition("/")[0] if word.startswith("MIG-GPU-") else word
        meant = [gpu for gpu in present if whole and (gpu["index"] == whole or gpu["uuid"].startswith(whole))]
        if len(meant) != 1 and not word.startswith("MIG-"):
            break
        found += [gpu for gpu in meant if gpu not in found]
    return found


# ---- memory, against the plan


def device_memory(subject: Subject) -> Iterator[Finding]:
    """What the plan puts on each GPU at the largest moment, against what it has."""
    for stage, plan in subject.planned:
        if plan.cluster.on_cpu:
            continue
        need, memory = plan.device_peak.device_bytes, plan.cluster.device_memory
        text = f"{stage.title} takes {gib(need)} of each device's {gib(memory)} ({plan.device_peak.name})"
        values = {"stage": stage.title, "needed_bytes": need, "device_bytes": memory}
        if need > memory:
            yield Finding("failure", f"{text}: it does not fit", _what_to_change(stage), values)
        else:
            yield Finding("ok", text, values=values)


def host_memory(subject: Subject) -> Iterator[Finding]:
    """Memory that is free on this host or in its container, against what the plan says that a stage takes of it."""
    for stage, error in subject.plans:
        if isinstance(error, Exception):
            reason = " ".join(str(error).split())
            remedy = "rlhf plan says more; --model-config describes a model that is not here to it"
            yield Finding("warning", f"what {stage.title} takes is not known: {reason}", remedy)
    memory = read_memory()
    if memory is None:
        yield Finding("warning", "not known: no /proc/meminfo", "a Linux host tells how much is free")
        return
    where = "up to the limit of this container or job" if memory.limited else "of this host"
    text = f"{gib(memory.free)} free, {where} ({gib(memory.total)} in all)"
    largest = max(subject.planned, key=lambda each: each[1].node_host_bytes, default=None)
    values = {"free_bytes": memory.free, "needed_bytes": 0 if largest is None else largest[1].node_host_bytes}
    if largest is None:
        scarce = memory.free < LOW_MEMORY
        remedy = "end other processes, or raise the limit of the container"
        yield Finding("warning" if scarce else "ok", text, remedy if scarce else None, values)
        return
    stage, plan = largest
    text += f"; {stage.title} takes {gib(plan.node_host_bytes)} with {plan.cluster.devices_per_node} rank(s)"
    if plan.node_host_bytes > memory.free:
        text += ": the system would kill the run (exit code -9)"
        yield Finding("failure", text, _what_to_change(stage), values)
        return
    group = max(subject.planned_together, key=_host_bytes)
    need = _host_bytes(group)
    if need > memory.free:
        names = ", ".join(each.title for each, _ in group)
        text += f"; {names} at a time take {gib(need)}: the system may kill them (exit code -9)"
        yield Finding("warning", text, "--parallel 1 runs one after the other", values | {"together_bytes": need})
    else:
        yield Finding("ok", text, values=values)


def _host_bytes(group: "Sequence[tuple[PipelineStage, StagePlan]]") -> int:
    return sum(plan.node_host_bytes for _, plan in group)


def _what_to_change(stage: PipelineStage) -> str:
    return f"rlhf plan {stage.stage.name} says what takes it and which setting helps; or fewer ranks on this host"


# ---- shared memory and disk


def shared_memory(subject: Subject) -> Iterator[Finding]:
    """Where NCCL and data loaders pass things between the processes of a host."""
    remedy = "in a container: docker run --shm-size=1g (or --ipc=host); else mount -o remount,size=1g /dev/shm"
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        yield Finding("warning", f"{SHARED_MEMORY}: {error.strerror}", remedy)
        return
    text = f"{gib(free)} free in {SHARED_MEMORY}"
    if free < LEAST_SHARED:
        text += f": less than {gib(LEAST_SHARED)}, NCCL may end with a bus error"
        yield Finding("warning", text, remedy)
    else:
        yield Finding("ok", text)


def disk(subject: Subject) -> Iterator[Finding]:
    """Room and rights where the run writes."""
    needs = {subject.output: sum(_disk_bytes(plan) for _, plan in subject.planned)}
    needs |= {Path(path): 0 for stage in subject.trained if (path := stage.config.engine.nvme_path) is not None}
    for group in subject.planned_together:
        swapped: dict[Path, int] = {}
        for stage, plan in group:
            if (path := stage.config.engine.nvme_path) is not None:
                own = plan.cluster.devices_per_node * sum(states.nvme for states in plan.states.values())
                swapped[Path(path)] = swapped.get(Path(path), 0) + own
        needs |= {folder: max(needs.get(folder, 0), size) for folder, size in swapped.items()}
    for folder, need in needs.items():
        yield _room(folder, need)


def _disk_bytes(plan: "StagePlan") -> int:
    """Checkpoints, published weights and caches, less what is there already."""
    from launch.plan.planner import disk as planned_disk

    output = plan.config.output
    present = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return max(0, sum(planned_disk(plan).values()) - present)


def _room(folder: Path, need: int) -> Finding:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    text = f"{gib(usage.free)} free for {folder}"
    values = {"free_bytes": usage.free, "needed_bytes": need}
    fault = _write_fault(place)
    if fault is not None:
        remedy = "choose another output=FOLDER, or mend its rights, quota or mount"
        return Finding("failure", f"{folder}: cannot be written to: {fault}", remedy, values)
    remedy = "free some, choose another output=FOLDER, or lower train.keep_checkpoints"
    if need:
        text += f"; checkpoints and weights take about {gib(need)}"
    if usage.free < (need or LEAST_DISK):
        return Finding("failure", f"{text}: not enough", remedy, values)
    if not need and usage.free < LOW_DISK:
        return Finding("warning", f"{text}: little for checkpoints of a large model", remedy, values)
    return Finding("ok", text, values=values)


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
