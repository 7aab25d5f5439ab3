"""Python functions as rewards: what they may ask for, what they may answer, how they fail."""

import asyncio
import functools
import socket
from dataclasses import fields, replace

import pytest

from reward.function import Answers, Failure, PythonReward
from rlhf.core.errors import ConfigError, DataError

TALK = ({"role": "system", "content": "so"}, {"role": "user", "content": "2 + 2?"})
ANSWERS = Answers(
    prompts=["1 + 1?", TALK],
    responses=["2", "5"],
    token_ids=[[7], [8, 9]],
    ended=[True, False],
    columns=[{"answer": "2", "level": 1}, {"answer": "4"}],
)


def reward(function, **settings) -> PythonReward:
    return PythonReward("rules:it", function, **settings)


def test_a_function_gets_what_its_parameters_ask_for():
    seen = {}

    def ask(prompts, responses, answer, *, messages, token_ids, ended, level=None, absent="unset", scale):
        seen.update(locals())
        return [scale, None]

    assert reward(ask, options={"scale": 3})(ANSWERS) == [3.0, None]
    del seen["seen"]
    assert seen == {
        "prompts": ["1 + 1?", "2 + 2?"], "responses": ["2", "5"], "answer": ["2", "4"], "token_ids": [[7], [8, 9]],
        "messages": [({"role": "user", "content": "1 + 1?"},), TALK], "ended": [True, False], "level": [1, None],
        "absent": "unset", "scale": 3,
    }  # fmt: skip


def test_a_function_that_takes_all_gets_all():
    def ask(prompts, completions, **others):
        return [len(others)] * 2

    assert reward(ask)(ANSWERS) == [5.0, 5.0]  # answer, level, messages, token_ids, ended
    assert reward(ask).needs == ()


def test_a_parameter_may_stand_for_a_column_of_another_name():
    def ask(prompts, responses, *, right):
        return [float(a == b) for a, b in zip(responses, right, strict=True)]

    renamed = reward(ask, columns={"right": "answer"})
    assert renamed(ANSWERS) == [1.0, 0.0]
    assert renamed.needs == ("answer",)


@pytest.mark.parametrize("function", [min, functools.partial(lambda prompts, responses, *, k: [k] * 2, k=1)])
def test_what_is_callable_is_called(function):
    """Built-in functions have no parameters to look at; those of partial ones are set."""
    if function is min:
        assert reward(function)(replace(ANSWERS, responses=["0", "1"], prompts=["5", "6"])) == [0, 1]
    else:
        assert reward(function)(ANSWERS) == [1.0, 1.0]


def test_a_column_that_is_in_no_row_is_named_with_those_that_are():
    def ask(prompts, responses, *, tests):
        return [0.0, 0.0]

    assert reward(ask).needs == ("tests",)
    with pytest.raises(ConfigError, match=r"rules:it asks for 'tests'.*no such column; there are: answer, level"):
        reward(ask)(ANSWERS)


def test_a_row_without_a_column_that_others_have_has_none_there():
    """Whatever stands beside it: a rank, or a call for one row, may see no row that has it."""

    def ask(prompts, responses, *, answer, level=7):
        return [float(answer == [None]), float(level == [None])][: len(responses)]

    plain = reward(ask)
    alone = Answers(**{**vars(ANSWERS.at(1)), "columns": [{}]})
    with pytest.raises(ConfigError, match="asks for 'answer'"):
        plain(alone)
    knowing = plain.reading(ANSWERS.prompts, ANSWERS.columns)
    assert knowing(alone) == [1.0]
    assert knowing.known == ("answer", "level")
    assert knowing.reading(["q"], [{"answer": "1"}]).known == ("answer", "level"), "held-out rows take none away"
    with pytest.raises(ConfigError, match=r"there are: none beside the prompt"):
        plain.reading(["q"], [{}])


def test_a_function_that_asks_for_tokens_is_refused_where_there_are_texts_alone():
    def counts(prompts, responses, *, token_ids):
        return [float(len(tokens)) for tokens in token_ids]

    def counts_or_guesses(prompts, responses, *, token_ids=None):
        return [len(text) / 4 for text in responses] if token_ids is None else counts(prompts, responses, token_ids)

    texts = replace(ANSWERS, token_ids=None)
    assert reward(counts)(ANSWERS) == [1.0, 2.0]
    for ask in (reward(counts), reward(counts).each):
        with pytest.raises(ConfigError, match="rules:it asks for token_ids, and here only texts are known"):
            ask(texts)
    assert reward(counts_or_guesses)(texts) == reward(counts_or_guesses)(texts.at(0)) * 2 == [0.25, 0.25]


@pytest.mark.parametrize("settings", [{"options": {"scale": 2}}, {"columns": {"scale": "answer"}}])
def test_an_argument_that_the_function_does_not_know_is_refused(settings):
    with pytest.raises(ConfigError, match="no parameter 'scale' to set; there are: answer"):
        reward(lambda prompts, responses, answer: [0.0], **settings)


def fails_on_5(prompts, responses):
    return [1.0 if float(text) < 5 else 1 / 0 for text in responses]


async def fails_on_5_slowly(prompts, responses):
    assert len(responses) == 1
    await asyncio.sleep(0.01)
    return fails_on_5(prompts, responses)


@pytest.mark.parametrize("function", [fails_on_5, fails_on_5_slowly])
def test_a_response_that_a_function_fails_on_fails_alone(function):
    with pytest.raises(DataError, match="rules:it failed on 2 responses: ZeroDivisionError"):
        reward(function)(ANSWERS)
    assert reward(function).each(ANSWERS) == [1.0, Failure("ZeroDivisionError: division by zero")]


@pytest.mark.parametrize("given", [[1.0], [1.0, 2.0, 3.0], []])
def test_a_wrong_number_of_rewards_is_no_matter_of_single_responses(given):
    async def later(prompts, responses):
        return given * 3

    for function in (lambda prompts, responses: given, later):
        if function is later and len(given) == 0:
            continue
        with pytest.raises(DataError, match=r"gave \d scores for \d responses"):
            reward(function).each(ANSWERS)


def test_asynchronous_calls_run_side_by_side_within_their_bound_and_time():
    running, most = 0, 0

    async def ask(prompts, responses):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(30 if responses == ["5"] else 0.02)
        finally:
            running -= 1
        return [1.0]

    many = Answers(**{each.name: list(getattr(ANSWERS, each.name)) * 4 for each in fields(Answers)})
    found = reward(ask, timeout_seconds=0.2, concurrency=3).each(many)
    assert found == [1.0, Failure("no answer within 0.2 s")] * 4
    assert most == 3


def test_a_client_that_functions_keep_open_serves_all_calls():
    """Those of the next step, and those of another term: a connection is of the event loop that opened it."""
    connections = []

    async def ask(prompts, responses):
        if not connections:
            reader, writer = await asyncio.open_connection(sock=ours)
            connections.append((reader, writer))
        reader, writer = connections[0]
        writer.write(b"4")
        await writer.drain()
        return [float(await reader.readexactly(1))]

    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(b"4" * 6)
        one, other = reward(ask, concurrency=1), reward(ask, concurrency=1)
        assert [one(ANSWERS), one(ANSWERS), other(ANSWERS)] == [[4.0, 4.0]] * 3
        assert theirs.recv(10) == b"4" * 6
        connections[0][1].close()


def test_an_object_with_an_asynchronous_call_is_asynchronous():
    class Judge:
        async def __call__(self, prompts, responses, *, answer):
            return [float(responses == answer)]

    assert reward(Judge())(ANSWERS) == [1.0, 0.0]


def level_or_fault(prompts, responses, *, level, tests=None):
    assert len(level) == len(responses) and tests is None
    if "5" in responses and "2" in responses:
        raise ValueError("too many at once")
    return level


async def level_later(prompts, responses, *, level, tests=None):
    return level_or_fault(prompts, responses, level=level, tests=tests)


@pytest.mark.parametrize("function", [level_or_fault, level_later])
def test_an_answer_that_is_asked_about_by_itself_has_the_columns_of_all(function):
    """Its row may lack one that others have."""
    assert reward(function).each(ANSWERS) == [1.0, None]
