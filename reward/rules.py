"""Rewards that need no model: the right text, the right number, the right form. See docs/ppo.md for how to use them.

Each is a function for ``reward.function`` or one of ``reward.terms``, such as ``reward.rules:same_number``; ``answer``
is the column that holds the right answer, and a row without one is left out.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

MARK = "####"
MOST_DIGITS = 300
"""Longer numbers have no value: a model that repeats itself writes digits without end."""
THINK_THEN_ANSWER = r"\s*<think>.+?</think>\s*\S.*"

_BOXED = re.compile(r"\\boxed\s*\{")
_SAID = re.compile(r"(?i)\banswer\s*(?:is|:|=)+\s*:?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf)\s*\{[^{}]*\}")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w.])[-+\u2212])?(?:{_DIGITS})(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_ALONE = re.compile(rf"(?:[^\d=:]*[=:])?\s*\\?[$\u20ac\u00a3]?({_NUMBER.pattern})(?:\s*\\?%|\.|\$|\s[^\d^_*/]*)?\s*")
"""A number by itself, but for what it is the value of, a currency, or a unit."""


def same_text(prompts: Sequence[str], responses: Sequence[str], *, answer: Sequence[object]) -> list[float | None]:
    """1 where a response is the answer, up to case and white space, else 0.

    Args:
        prompts: not looked at.
        responses: N texts.
        answer: N right answers; ``None`` where there is none, and then no reward.
    """
    return [
        None if right is None else float(_plain(text) == _plain(str(right)))
        for text, right in zip(responses, answer, strict=True)
    ]


def same_number(prompts: Sequence[str], responses: Sequence[str], *, answer: Sequence[object]) -> list[float | None]:
    r"""1 where the final answer of a response is that of the row, else 0: for rows like those of GSM8K.

    The final answer is what stands in the last ``\boxed{}``, else the number behind the last ``####`` (as in GSM8K),
    else that behind the last "answer is" or "answer:", else the last number. Numbers are the same if their values are:
    1,000 and 1000.0; 1/2, \frac{1}{2} and .5. Final answers that are no numbers are compared as texts.

    Args:
        prompts: not looked at.
        responses: N texts.
        answer: N right answers, or texts that mark them by ``\boxed{}`` or ``####``; ``None`` where there is none,
            and then no reward.
    """
    return [
        None if right is None else float(_is_same(final_answer(text), _marked_answer(str(right)) or str(right)))
        for text, right in zip(responses, answer, strict=True)
    ]


def has_form(prompts: Sequence[str], responses: Sequence[str], *, pattern: str = THINK_THEN_ANSWER) -> list[float]:
    """1 where the whole response has the form of ``pattern``, else 0.

    Args:
        prompts: not looked at.
        responses: N texts, without special tokens.
        pattern: a regular expression, in which a dot is any character. Unset: thoughts between ``<think>`` and
            ``</think>``, and an answer behind them.
    """
    form = re.compile(pattern, re.DOTALL)
    return [float(form.fullmatch(text) is not None) for text in responses]


def final_answer(text: str) -> str:
    """What a text gives as its answer; see :func:`same_number`. The whole text, if it holds no number."""
    marked = _marked_answer(text)
    if marked is not None:
        return marked
    said = list(_SAID.finditer(text))
    if said:
        return _first_number(text[said[-1].end() :])
    numbers = _NUMBER.findall(_bare(text))
    return numbers[-1] if numbers else text


def number_of(text: str) -> Fraction | None:
    """The value of a text that is a number, with a currency or a unit at most; else ``None``."""
    found = _ALONE.fullmatch(" ".join(_bare(text).split()))
    return _value(found[1]) if found else None


def _marked_answer(text: str) -> str | None:
    """The answer that a text marks as such; ``None`` if it marks none."""
    boxed = _boxed(text)
    if boxed is not None or MARK not in text:
        return boxed
    return _first_number(text.rpartition(MARK)[2])


def _first_number(text: str) -> str:
    """The first number in a text, or all of it if there is none."""
    first = _NUMBER.search(_bare(text))
    return first.group() if first else text


def _is_same(given: str, right: str) -> bool:
    left, wanted = number_of(given), number_of(right)
    if left is not None and wanted is not None:
        return left == wanted
    return bool(given.strip()) and _plain(given) == _plain(right)


def _value(number: str) -> Fraction | None:
    over, _, under = number.replace(",", "").replace("\u2212", "-").replace(" ", "").partition("/")
    _, _, exponent = over.lower().partition("e")
    too_long = max(len(over), len(under)) > MOST_DIGITS or len(exponent) > 4
    if too_long or abs(int(exponent or 0)) > MOST_DIGITS:  # its exact value would fill the memory
        return None
    if not under:
        return Fraction(over)
    return Fraction(over) / Fraction(under) if Fraction(under) else None


def _bare(text: str) -> str:
    """The text without what LaTeX puts into numbers and beside them, fractions as ``a/b``."""
    return _FRACTION.sub(r"\1/\2", _WORDS.sub(" ", text).replace("\\,", "").replace("\\!", "").replace("{,}", ","))


def _boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}``, braces within it included; ``None`` if none is closed."""
    begun = list(_BOXED.finditer(text))
    if not begun:
        return None
    start, depth = begun[-1].end(), 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place].strip()
    return None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
