"""What a tokenizer does to text, as a name to compare."""

import json
from typing import Any

from rlhf.core.files import digest

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = "Hello world,\n\n1. naïve 12345  tokens\tfür 日本語 🙂 don't\n"


def tokenizer_digest(tokenizer: Any, *, eos_token: str | None = None) -> str:
    """A name for what the tokenizer does to text: equal after save and load and in every process.

    Covers the vocabulary, merges, normalizer, pre-tokenizer, added and special tokens, and the ids of a
    probe text with its automatic special tokens. Leaves out what callers set per call: padding, truncation.

    Args:
        tokenizer: of Transformers.
        eos_token: the name as if this were its end token.
    """
    return _digest(tokenizer, eos_token, _settings_beside(tokenizer))


def former_tokenizer_digests(tokenizer: Any, *, eos_token: str) -> frozenset[str]:
    """The names that earlier versions gave, without some settings and by the tokenizer's own end token.

    Args:
        tokenizer: of Transformers.
        eos_token: what ends an answer.
    """
    return frozenset(_digest(tokenizer, end, []) for end in (None, eos_token))


def _digest(tokenizer: Any, eos_token: str | None, settings: list[str]) -> str:
    named = {name: getattr(tokenizer, name, None) for name in _NAMED_TOKENS}
    if eos_token is not None:
        named["eos_token"] = eos_token
    return digest(
        *_model_parts(tokenizer),
        *settings,
        json.dumps(named, sort_keys=True),
        json.dumps(tokenizer(_PROBE, padding=False, truncation=False)["input_ids"]),
    )


def _settings_beside(tokenizer: Any) -> list[str]:
    """Settings that change tokens of texts that the probe does not have; only those that differ from the usual."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    found = {name: model.get(name) for name in ("ignore_merges", "dropout")}
    found["split_special_tokens"] = getattr(tokenizer, "split_special_tokens", None)
    return [f"{name}={value}" for name, value in sorted(found.items()) if value]


def _model_parts(tokenizer: Any) -> list[str]:
    """Vocabulary, merges and splitting rules; spelled alike by different versions of ``tokenizers``."""
    added = {
        str(index): [token.content, token.special, token.lstrip, token.rstrip, token.normalized]
        for index, token in tokenizer.added_tokens_decoder.items()
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [json.dumps(tokenizer.get_vocab(), sort_keys=True), json.dumps(added, sort_keys=True)]
    state = json.loads(backend.to_str())
    model = state["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    parts = (model.get("type"), model["vocab"], merges, state["normalizer"], state["pre_tokenizer"], added)
    return [json.dumps(part, sort_keys=True) for part in parts]
