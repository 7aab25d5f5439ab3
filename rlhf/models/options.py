"""What a recipe says about the model."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from rlhf.core.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters (peft). The reward head is always trained in full and saved."""

    rank: Annotated[int, Gt(0)] = 32
    """Rank of the update."""
    alpha: Annotated[float, Gt(0)] = 64.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the adapter's input."""
    targets: str | list[str] = "all-linear"
    """Module names to adapt, or all-linear."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which model to start from and what of it is trained."""

    path: str
    """Transformers folder or hub name; a GGUF file is turned into a folder by `rlhf import-gguf`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    layers: Annotated[int, Gt(0)] | None = None
    """Keep only the first so many layers; null keeps all."""
    freeze_layers: Annotated[int, Ge(0)] = 0
    """Freeze the embeddings and this many lower layers; with LoRA, adapters go to the layers above only."""
    lora: LoraOptions | None = None
    """Train adapters instead of the weights; null trains the weights."""
    dropout: bool = False
    """Whether the model's own dropout acts in training. Off, policy and reference are compared without noise."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto takes flash_attention_2 where it is installed and the device has it, else what Transformers prefers."""
    kernels: Literal["none", "liger"] = "none"
    """liger: fused norms, rotary embeddings and MLPs on CUDA (pip install 'margin-rlhf[kernels]')."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder. Off unless you have read that code."""


def cut_layers(settings: Any, config: BackboneConfig) -> Any:
    """Cut a Transformers configuration, in place, to ``config.layers`` layers, if that is set.

    Raises:
        ModelError: if there are not so many.
    """
    if config.layers is not None:
        if config.layers > settings.num_hidden_layers:
            raise ModelError(f"model.layers = {config.layers}, but {config.path} has {settings.num_hidden_layers}")
        settings.num_hidden_layers = config.layers
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[: config.layers]
    return settings
