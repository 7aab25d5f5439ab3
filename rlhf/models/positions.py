"""How long a text may be for a model."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from rlhf.core.errors import ConfigError, ModelError
from rlhf.models.backbones import load_model_config
from rlhf.models.options import BackboneConfig, cut_layers
from rlhf.models.roles import ModelRole

BEHIND_PADDING = frozenset(
    {
        "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
        "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip
"""Types of models that count places from behind the id of the padding token, as RoBERTa does."""


def check_places(roles: Iterable[ModelRole], longest: int) -> None:
    """Refuse texts that one of the models of a run cannot read; see :func:`check_positions`.

    A model that is not there, or no model, is passed over: its own loading says so better.
    """
    for role in roles:
        try:
            settings = settings_of(role.backbone)
        except ModelError:
            continue
        check_positions(settings, longest, f"{role.setting} = {role.backbone.path}")


def settings_of(backbone: BackboneConfig) -> PretrainedConfig:
    """The configuration of a model, cut to its layers; also of a reward model with a head of two layers, which has a
    type of its own.

    Raises:
        ModelError: if there is no model.
    """
    file = Path(backbone.path).expanduser() / "config.json"
    with contextlib.suppress(OSError, ValueError):  # what loads it says better what is wrong
        content = json.loads(file.read_text(encoding="utf-8"))
        if "backbone_model_type" in content:
            kept = {name: each for name, each in content.items() if name not in ("model_type", "backbone_model_type")}
            return cut_layers(AutoConfig.for_model(content["backbone_model_type"], **kept), backbone)
    return load_model_config(backbone)


def check_positions(settings: PretrainedConfig, longest: int, origin: str) -> None:
    """Refuse texts that a model has no places for, or reads in another way depending on what stands beside them.

    LongRoPE takes other factors for a whole block of rows as soon as its longest row passes the length of the first
    training: what a model says of a row would then depend on the micro-batch that the row is in.

    Args:
        settings: of the model.
        longest: tokens of the longest text, those still to be written included.
        origin: setting and name of the model, for the message.
    Raises:
        ConfigError: with the length that fits.
    """
    room, taken = places_of(settings), _places_taken(settings)
    if room is not None and room < longest:
        behind = f" less the first {taken}" if taken else ""
        raise ConfigError(
            f"{origin} has places for {room} tokens (max_position_embeddings{behind}), and the longest text, "
            f"with new tokens, takes {longest}: lower max_tokens of the data or rollout.max_new_tokens"
        )
    rope = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    first = rope.get("original_max_position_embeddings") or getattr(settings, "original_max_position_embeddings", None)
    if kind == "longrope" and isinstance(first, int) and first < longest:
        raise ConfigError(
            f"{origin} uses LongRoPE, whose factors change for a whole block once a row passes {first} "
            f"tokens, and the longest text, with new tokens, takes {longest}: results would depend on the "
            f"micro-batches. Keep texts within {first} tokens"
        )


def places_of(settings: PretrainedConfig) -> int | None:
    """The longest text in tokens that a model with these settings takes; ``None`` where its settings name no limit."""
    limit = getattr(settings, "max_position_embeddings", None)
    return limit - _places_taken(settings) if isinstance(limit, int) and limit > 0 else None


def _places_taken(settings: PretrainedConfig) -> int:
    """Positions that no token may have: families of RoBERTa count from behind the padding token."""
    absolute = getattr(settings, "position_embedding_type", "absolute") == "absolute"
    return (
        (getattr(settings, "pad_token_id", None) or 0) + 1 if settings.model_type in BEHIND_PADDING and absolute else 0
    )
