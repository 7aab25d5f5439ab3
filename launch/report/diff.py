"""Two texts beside each other: which words of the second are not in the first."""

import re
from difflib import SequenceMatcher

LONGEST = 600
"""Words; longer texts are not compared."""


def marked(before: str, after: str) -> tuple[tuple[str, bool], ...]:
    """Parts that make up ``after``, each with whether it is new."""
    old, new = re.findall(r"\s+|\S+", before), re.findall(r"\s+|\S+", after)
    if not old or len(old) + len(new) > 2 * LONGEST:
        return ((after, False),)
    parts: list[tuple[str, bool]] = []
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if end > start:
            parts.append(("".join(new[start:end]), kind != "equal"))
    return tuple(parts)
