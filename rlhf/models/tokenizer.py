"""Tokenizers under one policy: the padding token can never be the last token of a text.

Plain ``AutoModelForSequenceClassification`` pools at the right-most token that is not ``pad_token_id``. Where
padding falls back to the end token, it reads the token before the end instead.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.core.errors import ModelError
from rlhf.models.adapters import holder_of

logger = logging.getLogger(__name__)

RULE = "the padding token never ends a text"
NEW_PAD_TOKEN = "<|pad|>"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder without any of them has no tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PadPolicy:
    """Which token pads, and why that one."""

    pad_token: str
    pad_token_id: int
    reason: str
    added: bool = False
    """The token is new: the model's embedding may have to grow, see :func:`required_embedding_rows`."""


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, with ``pad_token`` set by :func:`choose_pad_token`.

    ``revision`` is a branch, tag or commit on the hub. ``chat_template`` replaces the tokenizer's own, so that it is
    saved with it.

    Raises:
        ModelError: if there is no usable tokenizer at ``path``.
    """
    origin, revision = holder_of(TOKENIZER_FILES, path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(origin, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged tokenizer.json is a bare Exception of the tokenizers package
        raise ModelError(
            f"{path}: no tokenizer can be loaded from here ({type(error).__name__}: {error}). Expected a "
            "Transformers folder with tokenizer.json, or a hub name; for a GGUF file see rlhf import-gguf"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.eos_token and tokenizer.sep_token:
        tokenizer.eos_token = tokenizer.sep_token  # encoders such as BERT end every text with it
    policy = choose_pad_token(tokenizer)
    if policy.pad_token != tokenizer.pad_token:
        logger.info("%s: padding with %s: %s", path, policy.pad_token, policy.reason)
        apply_pad_policy(tokenizer, policy)
    return tokenizer


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> PadPolicy:
    """The first of: the own padding token, the unknown token, an idle special token, a new token.

    The own or unknown token is taken only if it can never end a text: it is not the end token, not the
    beginning token, and the chat template does not write it. Nothing is changed in ``tokenizer``.
    """
    for token, reason in _existing_candidates(tokenizer):
        if token is not None and not _may_end_a_text(tokenizer, token):
            token_id = tokenizer.convert_tokens_to_ids(token)
            assert isinstance(token_id, int)
            return PadPolicy(pad_token=token, pad_token_id=token_id, reason=reason)
    return PadPolicy(
        pad_token=NEW_PAD_TOKEN,
        pad_token_id=required_embedding_rows(tokenizer),
        reason="new token: every existing special token can end a text",
        added=True,
    )


def apply_pad_policy(tokenizer: PreTrainedTokenizerBase, policy: PadPolicy) -> None:
    """Make ``policy.pad_token`` the padding token, adding it to the vocabulary if it is new."""
    tokenizer.add_special_tokens({"pad_token": policy.pad_token})
    if tokenizer.pad_token_id != policy.pad_token_id:
        raise ModelError(
            f"the padding token {policy.pad_token!r} has id {tokenizer.pad_token_id}, expected "
            f"{policy.pad_token_id}: this tokenizer numbers its added tokens with gaps; give it a padding "
            "token of its own first"
        )


def pad_policy(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Padding and end token in force, for a manifest."""
    return {
        "rule": RULE,
        "pad_token": tokenizer.pad_token,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
    }


def required_embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every token id: exactly that many, not rounded up."""
    return max(tokenizer.get_vocab().values()) + 1


def _existing_candidates(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str | None, str]]:
    yield tokenizer.pad_token, "the tokenizer's own padding token, which never ends a text"
    own = (
        f"its own ({tokenizer.pad_token}) can end a text"
        if tokenizer.pad_token
        else "it has no padding token"
    )
    yield tokenizer.unk_token, f"unknown token: {own}"
    for token in _idle_special_tokens(tokenizer):
        yield token, f"special token without a use in the chat template: {own}"


def _idle_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that say by their name that they are free or made for padding."""
    special = [
        str(added.content) for _, added in sorted(tokenizer.added_tokens_decoder.items()) if added.special
    ]
    for_padding = [token for token in special if "pad" in token.lower()]
    free = [token for token in special if any(word in token.lower() for word in ("reserved", "unused"))]
    return for_padding + free


def _may_end_a_text(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether the token is the end or beginning token, or one that the chat template writes."""
    templates = tokenizer.chat_template or ""
    written = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    return token in (tokenizer.eos_token, tokenizer.bos_token) or token in written
