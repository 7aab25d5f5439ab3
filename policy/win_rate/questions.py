"""What a judge is asked of two answers, and what its reply says."""

import re
from dataclasses import dataclass

from policy.judging.asking import said
from rlhf.data.messages import Asked, Message, as_messages

_INSTRUCTIONS = (
    "You compare two answers to the last message of a conversation. Judge how well each does what was asked: whether "
    "it is right, helpful, honest and clear. Neither length nor the order of the answers is a merit. You may think "
    "first; end with your verdict alone: [[A]] if the first answer is better, [[B]] if the second is, or [[TIE]]."
)
_MARKED = re.compile(r"\[\[\s*(A|B|C|TIE)\s*\]\]", re.IGNORECASE)
_WORD = re.compile(r"\b(?:A|B|(?i:TIE))\b")  # an "a" within a sentence is an article
_WORTH = {"A": 1.0, "B": 0.0, "TIE": 0.5, "C": 0.5}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What two models answered to one question."""

    id: str
    """File and line of the own answer."""
    prompt: Asked
    own: str
    other: str


def question(pair: Pair, *, swapped: bool) -> list[Message]:
    """What the judge is asked of a pair, whose own answer stands first unless ``swapped``."""
    talk = "\n\n".join(f"[{each['role']}]\n{each['content']}" for each in as_messages(pair.prompt))
    first, second = (pair.other, pair.own) if swapped else (pair.own, pair.other)
    asked = (
        f"# Conversation\n\n{talk}\n\n# Answer A\n\n{first}\n\n# Answer B\n\n{second}\n\n"
        "# Your verdict: [[A]], [[B]] or [[TIE]]"
    )
    return [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": asked}]


def verdict(reply: str) -> float:
    """What the first answer is worth by a reply: 1, 0 or .5. The last verdict in double brackets counts.

    Without one, the whole reply, or its last line, may be a verdict, or hold one of the words and no other.

    Raises:
        ValueError: if it says nothing, or several things.
    """
    text = said(reply)
    marked = _MARKED.findall(text)
    if marked:
        return _WORTH[marked[-1].upper()]
    last = text.strip().rpartition("\n")[2]
    whole = last.strip(" .*").upper()
    for words in ({whole} & _WORTH.keys() - {"C"}, _words(last), _words(text)):
        if len(words) == 1:
            return _WORTH[words.pop()]
    raise ValueError(f"a reply without one verdict: {reply[:60]!r}")


def _words(text: str) -> set[str]:
    return {each.upper() for each in _WORD.findall(text)}
