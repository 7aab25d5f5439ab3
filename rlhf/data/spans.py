"""Places in a text: of characters, and of the tokens that hold them."""

from typing import Any

Span = tuple[int, int]
"""Half-open interval of characters or tokens: the first one, and the one after the last."""


def after_thoughts(text: str, span: Span) -> int:
    """Where the answer begins in a turn that may begin with thoughts."""
    turn = text[slice(*span)]
    opened = text[: span[0]].rstrip().endswith("<think>")
    end = turn.find("</think>")
    if end < 0 or not (opened or turn.lstrip().startswith("<think>")):
        return span[0]
    behind = turn[end + len("</think>") :]
    return span[1] - len(behind.lstrip())


def token_span(batch: Any, row: int, span: Span, size: int, count: int) -> Span:
    """Which of the ``count`` tokens of a text of ``size`` characters hold a character of ``span``."""
    begin, end = (_token_at(batch, row, place, size, count) for place in span)
    reaches_beyond = end < count and batch.token_to_chars(row, end).start < span[1]
    return begin, end + reaches_beyond


def _token_at(batch: Any, row: int, begin: int, end: int, count: int) -> int:
    """The first token that holds a character from ``begin`` on (white space may belong to no token)."""
    for place in range(begin, end):
        token = batch.char_to_token(row, place)
        if token is not None:
            return token
    return count
