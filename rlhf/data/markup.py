"""Marks of chat templates in texts: rows that carry the markup already."""

import re
from collections.abc import Iterable, Sequence

from rlhf.data.messages import Message

_WELL_KNOWN_MARKS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>",
    "<|start_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<｜User｜>",
    "<｜Assistant｜>",
)  # fmt: skip


def marks(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds ``tokens``, and marks of well-known templates."""
    found = {token for token in [*tokens, *_WELL_KNOWN_MARKS] if token and token != "None" and len(token) > 1}
    return re.compile("|".join(re.escape(token) for token in sorted(found, key=len, reverse=True)))


def markup_in(messages: Sequence[Message], pattern: re.Pattern[str]) -> tuple[str, ...]:
    """A warning where the texts hold what ``pattern`` finds; none otherwise."""
    found = {mark for message in messages for mark in pattern.findall(message["content"])}
    if not found:
        return ()
    names = ", ".join(sorted(found)[:3])
    return (f"warning: texts carry markup of a chat template already ({names}): it is put around them once more",)
