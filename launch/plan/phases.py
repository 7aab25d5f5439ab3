"""The phases of a run at which memory may peak, each with everything that is there at that time.

A pass forward fills the activations; the backward pass empties them layer by layer while gradients appear; the
optimizer steps without activations. Which of these is the largest depends on sizes: all are computed, the largest is
reported.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from launch.plan.activations import (
    Load,
    adapter_holes_bytes,
    boundary_bytes,
    head_bytes,
    layer_bytes,
    norm_bytes,
    working_bytes,
)
from launch.plan.models import EmptyModel
from launch.plan.shapes import Attention
from launch.plan.states import States

HOST_BASE_CPU = 530 * 2**20
"""Resident memory of a CPU rank without a model of any size: Python, torch, Transformers, DeepSpeed, data libraries.
Measured with a model of 30,000 parameters; see docs/plan.md."""
HEAP_CPU = 150 * 2**20
"""Pieces of the C library's heap that were freed and that no later tensor fits into. A round figure, not derived."""
HOST_BASE_CUDA = 4 * 2**30
"""Resident memory of a GPU rank without a model, CUDA's libraries included: an assumption."""
DEVICE_BASE = 3 * 2**29
"""Memory of each GPU outside torch's allocator: CUDA context, kernels, NCCL's buffers. An assumption."""
FRAGMENTATION = 0.05
"""Share that fragmentation adds to what torch's CUDA allocator hands out: an assumption."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes on one rank by name: on the device, and in the memory of its host."""

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a micro-batch of one model takes besides its states."""

    saved: int
    """Bytes of activations when the backward pass begins."""
    recomputed: int
    """Bytes of activations of one layer, made again under checkpointing."""
    working: int
    forward_head: int
    backward_head: int
    steps: int
    """Parts of the backward pass: layers, embeddings included."""
    embedding_gradient: int


def work_of(
    model: EmptyModel,
    load: Load,
    *,
    size: int,
    attention: Attention,
    checkpointing: bool,
    on_cpu: bool,
    chunk_tokens: int,
    fused: bool,
) -> Work:
    """Activations, logits and gradients of one micro-batch of a model under training."""
    shape = model.shape
    layer = partial(
        layer_bytes,
        shape,
        size=size,
        attention=attention,
        trained=model.trained,
        lora_rank=model.lora_rank,
        fused=fused,
    )
    active = model.active_layers
    if checkpointing:
        saved = active * boundary_bytes(shape, load.tokens, size=size)
        recomputed = layer(load.bucket_tokens, squares=load.bucket_squares, attended=load.attended)
    else:
        saved = active * layer(load.tokens, squares=load.squares, attended=load.attended)
        recomputed = 0
        if on_cpu and model.trained == "lora":
            saved += active * adapter_holes_bytes(shape, load.tokens, size=size, attended=load.attended)
    norm = norm_bytes(shape.hidden, size=size, trained=model.trained == "full", fused=fused)
    saved += load.tokens * (norm + shape.hidden * size)
    head = partial(
        head_bytes, shape, load.bucket_tokens, size=size, chunk_tokens=chunk_tokens, trained=model.head_trained
    )
    has_head = model.kind == "language model"
    embedding = 0
    if model.trained == "full" and active == shape.layers:
        embedding = size * shape.vocabulary * shape.hidden
    return Work(
        saved=saved,
        recomputed=recomputed,
        working=working_bytes(shape, load.bucket_tokens, size=size) + _scores(model, load, size, attention),
        forward_head=head(backward=False) if has_head else 0,
        backward_head=head(backward=True) if has_head else 0,
        steps=max(active, 1),
        embedding_gradient=embedding,
    )


def _scores(model: EmptyModel, load: Load, size: int, attention: Attention) -> int:
    """Eager attention's scores of one layer, of which two are at hand."""
    return 2 * size * model.shape.heads * load.bucket_squares if attention == "eager" else 0


def training_phases(role: str, states: States, work: Work, *, on_cpu: bool) -> list[Phase]:
    """Forward, backward and optimizer step of one model, without what else is in memory.

    On a CPU the heap that activations lay in is not given back to the system while the backward pass empties it, and
    flat buffers (over 32 MiB) are mapped beside it: resident memory counts both. So it does with the weights that stage
    3 gathers for the forward pass, between activations, and again for the backward pass.
    """
    passes = 2 if on_cpu else 1
    there = named(role, {**states.device, **states.moments})
    host = named(role, states.host)
    phases = []
    for done in range(work.steps + 1):
        share = done / work.steps
        grown = states.gradients_after - states.gradients_before
        items = {
            f"{role}: gathered weights": passes * states.gathered,
            f"{role}: gradients": states.gradients_before + round(grown * share),
            f"{role}: reduction buckets": states.buckets if share else 0,
            f"{role}: activations": round(work.saved * (1 if on_cpu else 1 - share)) + work.recomputed + work.working,
            f"{role}: logits": 0 if share else max(work.forward_head, work.backward_head),
            f"{role}: gradient of the embeddings": work.embedding_gradient if share == 1 else 0,
        }
        name = f"{role}: backward pass" + ("" if share else " begins")
        phases.append(Phase(name=name, device=there | items, host=host))
    items = {f"{role}: gradients": states.gradients_after, f"{role}: optimizer step": states.step}
    if on_cpu:
        items[f"{role}: activations"] = work.saved + work.recomputed + work.working
        items[f"{role}: gathered weights"] = passes * states.gathered
    phases.append(Phase(name=f"{role}: optimizer step", device=there | items, host=host))
    return phases


def forward_phase(role: str, states: States, work: Work) -> Phase:
    """A forward pass of a model that is only asked."""
    device = {**states.device, "gathered weights": states.gathered}
    items = {f"{role}: activations": work.working, f"{role}: logits": work.forward_head}
    return Phase(name=f"{role}: forward pass", device=named(role, device) | items, host=named(role, states.host))


def resting(role: str, states: States) -> Phase:
    """What a model takes while another one works."""
    gradients = {"gradients": states.gradients_before} if states.gradients_stay else {}
    device = named(role, {**states.device, **states.moments, **gradients})
    return Phase(name=role, device=device, host=named(role, states.host))


def named(role: str, items: Mapping[str, int]) -> dict[str, int]:
    return {f"{role}: {name}": value for name, value in items.items()}


def beside(phases: Iterable[Phase], others: Sequence[Phase]) -> list[Phase]:
    """Each of ``phases`` with what rests beside it."""
    device = {name: value for other in others for name, value in other.device.items()}
    host = {name: value for other in others for name, value in other.host.items()}
    return [Phase(name=each.name, device=device | dict(each.device), host=host | dict(each.host)) for each in phases]


def on_this_machine(phase: Phase, *, on_cpu: bool) -> Phase:
    """Add what no formula of a model has: libraries, contexts, fragmentation. On a CPU, device and host are one."""
    device = {name: value for name, value in phase.device.items() if value}
    host = {name: value for name, value in phase.host.items() if value}
    if on_cpu:
        fixed = {"libraries": HOST_BASE_CPU, "freed pieces of the heap": HEAP_CPU}
        return Phase(name=phase.name, device={}, host=fixed | device | host)
    slack = round(FRAGMENTATION * sum(device.values()))
    return Phase(
        name=phase.name,
        device={"CUDA context and NCCL": DEVICE_BASE} | device | {"fragmentation": slack},
        host={"libraries": HOST_BASE_CUDA} | host,
    )
