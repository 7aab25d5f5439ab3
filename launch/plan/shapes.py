"""Sizes of a decoder, as its configuration has them, and the configurations of a few well-known ones."""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.core.errors import ModelError

Attention = Literal["eager", "sdpa", "flash"]

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
"""Published shapes (the models' own config.json files), for plans without a folder on disk."""


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
