"""The tokens at which plain Transformers stops a model."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from rlhf.core.errors import ModelError
from rlhf.models.adapters import holder_of

log = logging.getLogger(__name__)


def model_stop_tokens(
    path: str | Path, tokenizer: Any, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """End tokens of ``generation_config.json``, or where a model has none, of its ``config.json``.

    Instruction models name tokens there that neither the tokenizer nor the chat template gives away: ``<|user|>`` of
    GLM-4, ``<|eom_id|>`` of Llama 3.1. Ordinary pieces of text are left out: a configuration that was never adapted
    to its tokenizer names them by accident.

    Args:
        path: Transformers folder or hub name.
        tokenizer: of that model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether Python code that comes with the model may run.
    Raises:
        ModelError: if Transformers could not read the generation config, or it names ends that are no tokens.
    """
    found = _named(path, revision, trust_remote_code)
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ordinary = [token for token in found if token not in added and 0 <= token < len(tokenizer)]
    if ordinary:
        pieces = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in ordinary)
        log.warning(
            "%s: generation_config.json or config.json names ordinary tokens as ends, which are not taken: %s; if they "
            "end a response, list them in rollout.stop_token_ids",
            path,
            pieces,
        )
    return tuple(token for token in found if token in added)


def _named(path: str | Path, revision: str | None, trust_remote_code: bool) -> list[int]:
    origin, revision = holder_of(("generation_config.json",), path, revision)
    chatter = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of settings that contradict each other, none of which is used here
    try:
        settings = GenerationConfig.from_pretrained(origin, revision=revision or "main")
    except (ValueError, TypeError) as error:
        raise _unreadable(path, error) from None
    except OSError as error:
        if (Path(origin) / "generation_config.json").is_file():
            raise _unreadable(path, error) from None
        try:
            settings = AutoConfig.from_pretrained(origin, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            return []
    finally:
        transformers_logging.set_verbosity(chatter)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        return []
    found = ends if isinstance(ends, (list, tuple)) else [ends]
    if not all(isinstance(token, int | float) and int(token) == token for token in found):
        raise ModelError(
            f"{path}: generation_config.json or config.json has eos_token_id = {ends!r}, expected the number of a "
            "token, or a list of them"
        )
    return [int(token) for token in found]


def _unreadable(path: str | Path, error: Exception) -> ModelError:
    said = " ".join(str(error).split())[:300]
    return ModelError(f"{path}: generation_config.json cannot be read ({said}): plain Transformers would not open it")
