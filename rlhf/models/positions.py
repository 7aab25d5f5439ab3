"""How long a text may be for a model."""

from transformers import PretrainedConfig

from rlhf.core.errors import ConfigError


def check_positions(settings: PretrainedConfig, longest: int, path: str) -> None:
    """Refuse texts that a model has no places for, or reads in another way depending on what stands beside them.

    LongRoPE takes other factors for a whole block of rows as soon as its longest row passes the length of the first
    training: what a model says of a row would then depend on the micro-batch that the row is in.

    Args:
        settings: of the model.
        longest: tokens of the longest text, those still to be written included.
        path: name of the model, for the message.
    Raises:
        ConfigError: with the length that fits.
    """
    limit = getattr(settings, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < longest:
        raise ConfigError(
            f"model.path = {path} has places for {limit} tokens (max_position_embeddings), and the longest text, with "
            f"new tokens, takes {longest}: lower max_tokens of the data or rollout.max_new_tokens"
        )
    rope = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    first = rope.get("original_max_position_embeddings") or getattr(settings, "original_max_position_embeddings", None)
    if kind == "longrope" and isinstance(first, int) and first < longest:
        raise ConfigError(
            f"model.path = {path} uses LongRoPE, whose factors change for a whole block once a row passes {first} "
            f"tokens, and the longest text, with new tokens, takes {longest}: results would depend on the "
            f"micro-batches. Keep texts within {first} tokens"
        )
