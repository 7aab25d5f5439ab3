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
_ALONE = re.compile(
    r"(?:(?:my |the |final )*verdict(?: is)?)?(?:[^\w?]|_)*(?:it is )?(A|B|(?:a )?tie)(?:[^\w?]|_)*", re.IGNORECASE
)
"""A line that is a verdict; in a line that says more, an A may be an article, and B what is talked about."""
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


def verdict(reply: str, *, was_cut: bool = False) -> float:
    """What the first answer is worth by a reply: 1, 0 or .5. The last verdict in double brackets counts.

    Where there is none, the last line may be a verdict and nothing else, unless the reply was cut there.

    Raises:
        ValueError: if it says nothing.
    """
    text = said(reply)
    marked = _MARKED.findall(text)
    if marked:
        return _WORTH[marked[-1].upper()]
    alone = None if was_cut else _ALONE.fullmatch(text.strip().rpartition("\n")[2].strip(" *_"))
    if alone is None:
        raise ValueError(f"a reply without one verdict: {reply[:60]!r}")
    return _WORTH[alone[1].upper().removeprefix("A ")]
