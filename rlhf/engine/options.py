"""What a recipe says about the optimizer and the engine."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from rlhf.core.annotations import NoResult

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: Annotated[float, Ge(0)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up; cosine and linear end at 0."""
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay on matrices; never on norms, biases and the reward head."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What trains the model."""

    kind: Literal["deepspeed", "local"] = "deepspeed"
    """deepspeed: ZeRO 0 to 3. local: plain torch in float32, for debugging."""
    deepspeed: str = "zero2"
    """A file of ds_configs by its short name (zero0, zero1, zero2, zero2_offload, zero3, zero3_offload, zero3_hpz,
    zero3_nvme), or a path to a DeepSpeed JSON of your own."""
    nvme_path: Annotated[str | None, NoResult()] = None
    """Folder on a disk of the node itself, for a DeepSpeed configuration that offloads to NVMe; ${oc.env:TMPDIR} takes
    each node's own. One run at a time may use it."""
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Precision of weights and activations; auto is bfloat16 on a GPU that has it, float32 elsewhere.
    The reward head and the loss are always float32."""
    max_skipped_steps: Annotated[int, Gt(0)] = 3
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    timeout_minutes: Annotated[float, Gt(0), NoResult()] = 60.0
    """How long a rank waits for the others before it gives up."""
    rendezvous_minutes: Annotated[float, Gt(0), NoResult()] = 10.0
    """The same at the start, until all are there: no longer than the slowest needs to import everything."""
