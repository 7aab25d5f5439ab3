"""How a chat template ends an answer: the token that ends it, and what the template writes behind that.

A response must end right behind its own end token, as a rollout does. Some templates write more: Phi-3 the EOS of the
whole conversation, the first template of Llama 3 the header of an answer that nobody asked for. It is found once, from
how the template shows three made-up conversations, and cut from every text.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlhf.data.messages import Message

QUESTION, ANSWER, NEXT = "question 4711", "answer 4712", "question 4713"


class Ending(NamedTuple):
    """What stands behind an answer."""

    token: str
    """The special token that ends it; EOS where the template writes none."""
    surplus: str
    """What the template writes behind that at the end of a conversation, without white space at its end."""


def find_ending(render: Callable[[Sequence[Message], bool], str], special: Sequence[str], eos: str) -> Ending:
    """The ending that a template gives to an answer.

    Special tokens behind an answer that are there only at the end of a conversation belong to the conversation. Of
    those that stay when it goes on, EOS ends the answer, or the first one where EOS is not among them.

    Args:
        render: text of messages, with the beginning of an answer behind them if asked.
        special: texts of the special tokens.
        eos: text of the tokenizer's end token.
    """
    asked = {"role": "user", "content": QUESTION}
    answered = [asked, {"role": "assistant", "content": ANSWER}]
    last = _behind(render(answered, False), ANSWER).rstrip()
    inside = _behind(_try(render, [*answered, {"role": "user", "content": NEXT}]), ANSWER)
    tokens, going_on = _leading_tokens(last, special), _leading_tokens(inside, special)
    both = enumerate(zip(tokens, going_on, strict=False))
    shared = next((place for place, ((one, _), (other, _)) in both if one != other), min(len(tokens), len(going_on)))
    opens_an_answer = bool(last) and _behind(render([asked], True), QUESTION).rstrip().endswith(last)
    if not shared and opens_an_answer:
        return Ending(eos, last)
    for token, end in tokens[: shared or None]:
        if token == eos:
            return Ending(eos, last[end:])
    return Ending(tokens[0][0], last[tokens[0][1] :]) if tokens else Ending(eos, "")


def _try(render: Callable[[Sequence[Message], bool], str], messages: Sequence[Message]) -> str:
    """Empty for a template that shows one turn only."""
    try:
        return render(messages, False)
    except Exception:  # a template may fail in any way
        return ""


def _behind(text: str, content: str) -> str:
    """What follows the last ``content``; nothing if the template does not show it."""
    return text.rpartition(content)[2] if content in text else ""


def _leading_tokens(text: str, special: Sequence[str]) -> list[tuple[str, int]]:
    """Special tokens at the beginning of ``text``, and where each ends; white space may stand around them."""
    any_of = re.compile(r"\s*(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
    found, place = [], 0
    while match := any_of.match(text, place):
        place = match.end()
        found.append((match[1], place))
    return found
