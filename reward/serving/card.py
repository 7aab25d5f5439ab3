"""What a server of a reward model says of itself, in one line: which weights, which form of text, which scale.

It is one of the names under which the model is served, so that every server that knows names can show it, vLLM's too;
and whoever asks for a model by this name gets its scores or none.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from rlhf.core.errors import ModelError
from rlhf.models.backbones import weights_digest
from rlhf.models.manifest import MANIFEST_NAME, read_manifest
from rlhf.models.options import BackboneConfig
from rlhf.train.chat import load_chat

PREFIX = "margin-rlhf/1:"
"""Begins every card; the number is that of this form of it."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A served reward model."""

    weights: str
    """Digest of config.json and all weights."""
    tokenizer: str
    """Digest of the tokenizer, as in the manifest."""
    template: str
    """Digest of the chat template, as in the manifest."""
    version: str
    """The version of margin-rlhf that published it; "unknown" without a manifest."""
    mean: float | None
    """Mean of held-out rewards, in logits; ``None`` where nothing was held out."""
    deviation: float | None
    """Standard deviation of held-out rewards, in logits."""

    def __str__(self) -> str:
        told = {name: value for name, value in vars(self).items() if value is not None}
        return PREFIX + ";".join(f"{name}={value}" for name, value in told.items())

    def differences(self, other: "Card") -> list[str]:
        """What the two say in different ways, with both values."""
        own, others = vars(self), vars(other)
        return [f"{name} ({own[name]} and {others[name]})" for name in own if own[name] != others[name]]


def card_of(folder: Path) -> Card:
    """The card of a published model.

    Raises:
        ModelError: if the folder is no model, or its manifest is damaged.
    """
    weights = weights_digest(BackboneConfig(path=str(folder)))
    if not (folder / MANIFEST_NAME).is_file():
        chat = load_chat(folder)
        return Card(
            weights=weights,
            tokenizer=chat.tokenizer_digest,
            template=chat.digest,
            version="unknown",
            mean=None,
            deviation=None,
        )
    manifest = read_manifest(folder)
    return Card(
        weights=weights,
        tokenizer=manifest.tokenizer_digest,
        template=manifest.template_digest,
        version=manifest.versions.get("margin-rlhf", "unknown"),
        mean=None if manifest.rewards is None else manifest.rewards.mean,
        deviation=None if manifest.rewards is None else manifest.rewards.standard_deviation,
    )


def read_card(text: str) -> Card | None:
    """The card that ``text`` is; ``None`` for any other name.

    Raises:
        ModelError: if it is the beginning of a card, but no whole one.
    """
    if not text.startswith("margin-rlhf/"):
        return None
    try:
        if not text.startswith(PREFIX):
            raise ValueError("another form of it, of another version of margin-rlhf")
        told = dict(part.split("=", 1) for part in text.removeprefix(PREFIX).split(";"))
        numbers = {name: float(told.pop(name)) if name in told else None for name in ("mean", "deviation")}
        if not all(number is None or math.isfinite(number) for number in numbers.values()):
            raise ValueError("a number that is not finite")
        mean, deviation = numbers["mean"], numbers["deviation"]
        return Card(**told, mean=mean, deviation=deviation)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{text[:200]!r}: no card of a reward model that this version reads ({error})") from error
