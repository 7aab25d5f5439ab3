"""How an endpoint is asked: what is waited for, what is refused, what is kept, and what is never shown."""

import json
from collections import Counter

import httpx
import pytest

from policy.judging import endpoint
from policy.judging.config import JudgeConfig
from policy.judging.endpoint import Judge, Refused, Unanswered
from policy.win_rate.questions import verdict
from rlhf.core.errors import ConfigError

URL = "http://judge/v1"


@pytest.fixture
def served(monkeypatch):
    """``served(respond)``: a judge's endpoint that answers a question by ``respond``; counts what is asked."""
    real = httpx.Client

    def start(respond):
        asked = Counter()

        def handle(request):
            text = json.loads(request.content)["messages"][-1]["content"]
            asked[text] += 1
            answer = respond(text)
            return said(answer) if isinstance(answer, str) else answer

        monkeypatch.setattr(
            endpoint.httpx, "Client", lambda **given: real(**given, transport=httpx.MockTransport(handle))
        )
        return asked

    return start


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were slept, of a clock that does not sleep."""
    found = []
    monkeypatch.setattr(endpoint.time, "sleep", found.append)
    return found


def said(text, reason="stop"):
    return httpx.Response(200, json={"choices": [{"message": {"content": text}, "finish_reason": reason}]})


def questions(count):
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


def judge(folder, **changes):
    return Judge(JudgeConfig(**{"url": URL, "model": "m", "concurrency": 1, **changes}), folder / "judge.jsonl")


@pytest.mark.parametrize("key", ["sk-secret\nsk-secret", "sk secret", "sk-secr\u00e9t", "sk-secret\x00"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(tmp_path, monkeypatch, key):
    monkeypatch.setattr("os.environ", {"MY_KEY": key})
    with pytest.raises(ConfigError, match="MY_KEY: expected a key of letters, digits and signs") as refused:
        judge(tmp_path, key_variable="MY_KEY")
    assert "sk" not in str(refused.value)


def test_a_key_may_end_with_a_line_and_is_hidden_where_the_endpoint_repeats_it(served, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", " sk-secret\n")
    served(lambda text: httpx.Response(401, text="no such key: sk-secret"))
    with pytest.raises(Refused, match=r"status 401: no such key: \(the key\)$"):
        judge(tmp_path, key_variable="MY_KEY").ask(questions(1), verdict)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("-1", [1, 2, 4]),
        ("0", [1, 2, 4]),
        ("nan", [1, 2, 4]),
        ("inf", [1, 2, 4]),
        ("Wed, 21 Oct 2026 07:28:00 GMT", [1, 2, 4]),
        ("3", [3, 3, 4]),
        ("1e9", [60, 60, 60]),
    ],
)
def test_an_endpoint_is_left_alone_for_as_long_as_it_says_and_ever_longer(served, tmp_path, waits, header, expected):
    asked = served(lambda text: httpx.Response(429, headers={"Retry-After": header}))
    (found,) = judge(tmp_path, tries=4).ask(questions(1), verdict)
    assert found == Unanswered(fault="status 429") and asked.total() == 4
    assert waits == expected


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 529])
def test_what_may_pass_is_asked_again(served, tmp_path, waits, status):
    answers = [httpx.Response(status), said("[[A]]")]
    asked = served(lambda text: answers.pop(0))
    assert judge(tmp_path).ask(questions(1), verdict)[0].value == 1.0 and asked.total() == 2 and waits == [1]


@pytest.mark.parametrize("status", [301, 307, 308])
def test_a_redirect_is_refused_with_its_status_and_where_it_leads(served, tmp_path, waits, status):
    asked = served(lambda text: httpx.Response(status, headers={"Location": "https://judge/v1"}))
    with pytest.raises(Refused, match=rf"{URL}: status {status}: it is at https://judge/v1 now"):
        judge(tmp_path).ask(questions(1), verdict)
    assert asked.total() == 1 and not waits


REFUSED = ("question 4", "question 5", "question 6")


def refuses_some(text):
    return httpx.Response(400, text="too long") if text in REFUSED else "[[A]]"


def test_refusals_of_single_questions_are_kept_with_the_replies(served, tmp_path):
    asked = served(refuses_some)
    first = judge(tmp_path).ask(questions(9), verdict)
    assert [each for each in first if isinstance(each, Unanswered)] == [Unanswered(fault="status 400: too long")] * 3
    again = judge(tmp_path)
    assert not again.unknown(questions(9), verdict)
    assert again.ask(questions(9), verdict) == first and set(asked.values()) == {1}
    shorter = judge(tmp_path, max_tokens=9).unknown(questions(9), verdict)
    assert [each[0]["content"] for each in shorter] == [*REFUSED], "with fewer tokens it might fit"


def test_further_questions_may_begin_with_refusals_where_others_were_answered_before(served, tmp_path):
    served(refuses_some)
    assert len(judge(tmp_path).ask(questions(4), verdict)) == 4
    assert sum(isinstance(each, Unanswered) for each in judge(tmp_path).ask(questions(9), verdict)) == 3


def test_refusals_before_the_first_reply_are_kept_once_there_is_one(served, tmp_path):
    asked = served(lambda text: refuses_some(f"question {8 - int(text[-1])}"))
    judge(tmp_path).ask(questions(9)[3:], verdict)  # 3 and 4 are refused first, then 2 would be
    judge(tmp_path).ask(questions(9)[3:], verdict)
    assert set(asked.values()) == {1}


def test_many_refusals_at_first_are_of_single_questions_where_a_harmless_one_is_answered(served, tmp_path):
    asked = served(lambda text: httpx.Response(400, text="too long") if text.startswith("question") else "[[A]]")
    found = judge(tmp_path).ask(questions(9)[1:7], verdict)  # all are refused
    assert found == [Unanswered(fault="status 400: too long")] * 6 and asked["Say yes."] == 1
    assert not judge(tmp_path).unknown(questions(9)[1:7], verdict), "they are kept"


def test_where_a_harmless_question_meets_a_full_endpoint_the_next_refusal_asks_again(served, tmp_path):
    full = [503]
    served(lambda text: httpx.Response(full.pop() if full and text == "Say yes." else 400, text="no"))
    with pytest.raises(Refused, match="status 400: no"):
        judge(tmp_path).ask(questions(9), verdict)
    assert not full


def test_where_all_is_refused_nothing_of_it_is_kept(served, tmp_path):
    asked = served(lambda text: httpx.Response(400, text="temperature"))
    for _ in range(2):
        with pytest.raises(Refused, match=rf"{URL}: status 400: temperature"):
            judge(tmp_path).ask(questions(9), verdict)
    assert not (tmp_path / "judge.jsonl").exists() and asked["question 0"] == 2


def test_a_reply_that_was_cut_stays_one_when_it_is_read_again(served, tmp_path):
    served(lambda text: said("[[A]] as", "length"))
    judge(tmp_path).ask(questions(1), verdict)

    def whole_only(reply, *, was_cut):
        if was_cut:
            raise ValueError("cut")
        return 1.0

    assert len(judge(tmp_path).unknown(questions(1), whole_only)) == 1
