"""Sizes of a decoder, as its configuration has them, and the configurations of a few well-known ones."""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.core.errors import ModelError

Attention = Literal["eager", "sdpa", "flash"]


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _published(model_type: str, *sizes: int, tied: bool = False, **more: int) -> dict[str, Any]:
    """A model's own config.json, as far as it decides on sizes: ``sizes`` in the order of :data:`SIZES`."""
    own = {"model_type": model_type, "architectures": [f"{model_type.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    return own | dict(zip(SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied} | more


KNOWN = {
    "smollm2-135m": _published("llama", 49152, 576, 1536, 30, 9, 3, 8192, tied=True),
    "llama-3.2-1b": _published("llama", 128256, 2048, 8192, 16, 32, 8, 131072, tied=True, head_dim=64),
    "llama-3-8b": _published("llama", 128256, 4096, 14336, 32, 32, 8, 8192),
    "llama-3-70b": _published("llama", 128256, 8192, 28672, 80, 64, 8, 8192),
    "qwen2.5-7b": _published("qwen2", 152064, 3584, 18944, 28, 28, 4, 32768),
}
"""Published shapes, for plans without a folder on disk."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the formulas read of a model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


def known_name(path: str) -> str | None:
    """The entry of :data:`KNOWN` that a hub name or folder speaks of: ``meta-llama/Meta-Llama-3-8B-Instruct``."""
    last = path.rstrip("/").rpartition("/")[2].lower()
    found = [name for name in KNOWN if name in last]
    return max(found, key=len) if found else None


def shape_of(settings: Any) -> ModelShape:
    """Read a Transformers configuration.

    Raises:
        ModelError: if it is not that of a decoder whose layers the formulas know.
    """
    heads, width = getattr(settings, "num_attention_heads", None), getattr(settings, "hidden_size", None)
    if not heads or not width:
        kind = getattr(settings, "model_type", type(settings).__name__)
        raise ModelError(
            f"model_type = {kind}: the plan knows decoders with num_attention_heads and hidden_size in their "
            "configuration (Llama, Mistral, Qwen and their like)"
        )
    named = (getattr(settings, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim"))
    intermediate = next(filter(None, named), 4 * width)  # as older decoders have it where they say nothing
    return ModelShape(
        vocabulary=settings.vocab_size,
        hidden=settings.hidden_size,
        intermediate=intermediate,
        layers=settings.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(settings, "num_key_value_heads", None) or heads,
        head_dim=getattr(settings, "head_dim", None) or settings.hidden_size // heads,
    )
