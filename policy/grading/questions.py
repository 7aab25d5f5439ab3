"""What a judge is asked of one answer, and the grade in its reply.

The form is that of FastChat's single-answer grading (fastchat/llm_judge, judge prompts single-v1, single-math-v1 and
both for several turns): the first turn is graded by itself, a later one within the conversation; where there is a
reference answer, the judge sees it. The words are our own.
"""

import re
from collections.abc import Sequence

from policy.judging.asking import said
from rlhf.data.messages import Message

WORST, BEST = 1, 10
_GRADER = (
    "You grade an AI assistant. Be impartial and strict; think about helpfulness, relevance, correctness, depth, "
    "creativity and detail. Length alone is no merit."
)
_FORM = (
    f'Explain briefly, then end with a grade from {WORST} to {BEST}, in exactly this form: "[[grade]]", such as [[5]].'
)
_SINGLE = "Grade the assistant's answer to the question below."
_SEVERAL = "Grade the assistant's answer to the user's last question in the conversation below; it alone counts."
_REFERENCE = (
    "There is a reference answer, which is right: compare the assistant's answer with it, and name mistakes before you "
    "grade."
)
_NUMBER = r"\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]"
_GRADE = re.compile(rf"\[{_NUMBER}\]")
_NAMED = re.compile(rf"\b(?:rating|grade|score)(?: is| of)?[\s:=*_]*{_NUMBER}", re.IGNORECASE)
_ALONE = re.compile(rf"[\s*_]*{_NUMBER}[\s.*_]*")
"""Single brackets hold indices and notes, too: what counts is called a grade, or all of the last line."""


def question(opening: str, turns: Sequence[tuple[str, str]], references: Sequence[str] = ()) -> list[Message]:
    """What the judge is asked of the last answer.

    Args:
        opening: what was said before the first question, as text; empty where there is nothing.
        turns: questions and answers, up to the one that is graded.
        references: right answers to the questions, as far as there are any.
    """
    known = references[: len(turns)]
    task = _SINGLE if len(turns) == 1 and not opening else _SEVERAL
    parts = [" ".join(filter(None, [task, _REFERENCE if known else "", _FORM]))]
    if known:
        right = "\n\n".join(
            f"### User:\n{asked}\n\n### Reference answer:\n{answer}"
            for (asked, _), answer in zip(turns, known, strict=False)
        )
        parts.append(f"<|The Start of Reference Answer|>\n\n{right}\n\n<|The End of Reference Answer|>")
    talk = "\n\n".join(f"### User:\n{asked}\n\n### Assistant:\n{answer}" for asked, answer in turns)
    talk = "\n\n".join(filter(None, [opening, talk]))
    parts.append(f"<|The Start of Conversation with User|>\n\n{talk}\n\n<|The End of Conversation with User|>")
    return [{"role": "system", "content": _GRADER}, {"role": "user", "content": "\n\n".join(parts)}]


def grade(reply: str, *, was_cut: bool = False) -> float:
    """The last grade in a reply, 1 to 10, in double brackets.

    Where there is none, one in single brackets counts that is called so ("Rating: [7]") or is all of the last line,
    unless the reply was cut.

    Raises:
        ValueError: if there is none.
    """
    text = said(reply)
    found = _GRADE.findall(text)
    if not found and not was_cut:
        alone = _ALONE.fullmatch(text.strip().rpartition("\n")[2])
        found = [alone[1]] if alone else _NAMED.findall(text)
    if not found:
        raise ValueError(f"a reply without a grade: {reply[:60]!r}")
    value = float(found[-1])
    if not WORST <= value <= BEST:
        raise ValueError(f"a grade that is not from {WORST} to {BEST}: {value:g}")
    return value
