import pytest

from rlhf.data.messages import BadRow
from rlhf.data.options import ColumnConfig
from rlhf.data.records import prompt_key, to_records
from rlhf.data.shapes import CONVERSATIONS, HUMAN_ASSISTANT, PROMPT_MESSAGES, PROMPT_TEXT


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def convert(row, **columns):
    [record], shape = to_records(row, ColumnConfig(**columns), row_id="f.jsonl:1", source="f.jsonl")
    return record, shape


def reason_for(row, **columns):
    with pytest.raises(BadRow) as caught:
        convert(row, **columns)
    return caught.value.reason


TEXT_ROW = {"prompt": "why?", "chosen": "because", "rejected": "no"}


def test_a_text_prompt_becomes_a_user_message():
    record, shape = convert(TEXT_ROW)
    assert shape == PROMPT_TEXT
    assert record.prompt == (user("why?"),)
    assert (record.chosen, record.rejected) == ((assistant("because"),), (assistant("no"),))
    assert (record.row_id, record.margin, record.chosen_score) == ("f.jsonl:1", None, None)


def test_message_lists_keep_role_and_content_only():
    chosen = [{"role": "assistant", "content": "because", "name": "x", "tool_calls": None}]
    record, shape = convert({"prompt": [user("why?")], "chosen": chosen, "rejected": [assistant("no")]})
    assert shape == PROMPT_MESSAGES
    assert record.chosen == (assistant("because"),)


def test_whole_conversations_are_split_where_they_part():
    shared = [user("hi"), assistant("hello"), user("why?")]
    record, shape = convert(
        {"chosen": [*shared, assistant("because")], "rejected": [*shared, assistant("no")]}
    )
    assert shape == CONVERSATIONS
    assert record.prompt == tuple(shared)
    assert record.rejected == (assistant("no"),)


def test_a_prompt_column_beside_whole_conversations_is_not_rendered_twice():
    row = {
        "prompt": "why?",
        "chosen": [user("why?"), assistant("a")],
        "rejected": [user("why?"), assistant("b")],
    }
    record, shape = convert(row)
    assert (record.prompt, record.chosen, shape) == ((user("why?"),), (assistant("a"),), CONVERSATIONS)


def test_a_shared_first_answer_belongs_to_the_prompt_only_if_answers_follow_on_both_sides():
    shared = [user("hi"), assistant("hello")]
    longer = {"chosen": shared, "rejected": [*shared, user("and?"), assistant("no")]}
    record, _ = convert(longer)
    assert record.prompt == (user("hi"),)
    assert record.chosen == (assistant("hello"),)
    assert len(record.rejected) == 3


def test_conversations_that_part_at_a_user_message_share_the_prompt_before_the_last_common_answer():
    head = [user("hi"), assistant("hello")]
    record, _ = convert(
        {"chosen": [*head, user("a"), assistant("x")], "rejected": [*head, user("b"), assistant("y")]}
    )
    assert record.prompt == (user("hi"),)
    assert record.chosen[0] == record.rejected[0] == assistant("hello")


def test_human_assistant_texts_with_several_turns_are_taken_apart():
    head = "\n\nHuman: hi\n\nAssistant: hello\nthere\n\nHuman: why?\n\nAssistant:"
    record, shape = convert({"chosen": head + " because ", "rejected": head + " no"})
    assert shape == HUMAN_ASSISTANT
    assert record.prompt == (user("hi"), assistant("hello\nthere"), user("why?"))
    assert (record.chosen, record.rejected) == ((assistant("because"),), (assistant("no"),))


def test_a_human_assistant_prompt_with_plain_answers_is_taken_apart_too():
    record, shape = convert({"prompt": "Human: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"})
    assert (record.prompt, shape) == ((user("hi"),), HUMAN_ASSISTANT)


def test_a_text_that_only_mentions_human_is_a_plain_text():
    record, shape = convert({**TEXT_ROW, "chosen": "Dear Human: hello", "rejected": "x\n\nHuman: y"})
    assert shape == PROMPT_TEXT
    assert record.chosen == (assistant("Dear Human: hello"),)
    record, shape = convert({**TEXT_ROW, "chosen": "Assistant: a\n\nHuman: b", "rejected": "Assistant: c"})
    assert shape == PROMPT_TEXT
    assert record.rejected == (assistant("Assistant: c"),)


def test_margin_and_scores_are_read_under_their_usual_or_given_names():
    record, _ = convert({**TEXT_ROW, "margin": 2, "score_chosen": 0.75, "score_rejected": "0.5"})
    assert (record.margin, record.chosen_score, record.rejected_score) == (2.0, 0.75, 0.5)
    record, _ = convert({**TEXT_ROW, "gap": 1.5, "margin": "unused"}, margin="gap")
    assert record.margin == 1.5


def test_an_empty_column_name_ignores_the_column():
    record, _ = convert({**TEXT_ROW, "margin": "very much"}, margin="")
    assert record.margin is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "missing column"),
        ({"chosen": ""}, "empty text"),
        ({"rejected": " \n"}, "empty text"),
        ({"prompt": ""}, "empty text"),
        ({"prompt": []}, "empty text"),
        ({"prompt": None, "chosen": " "}, "empty text"),
        ({"prompt": None}, "no prompt"),
        ({"rejected": "because "}, "identical pair"),
        ({"chosen": 3}, "wrong type"),
        ({"chosen": [{"role": "assistant", "content": None}], "rejected": [assistant("b")]}, "wrong type"),
        ({"chosen": [assistant("a")]}, "wrong type"),
        ({"prompt": {"text": "why?"}}, "wrong type"),
        ({"margin": float("nan")}, "non-finite number"),
        ({"margin": "much"}, "wrong type"),
        ({"margin": True}, "wrong type"),
        ({"chosen_score": float("inf"), "rejected_score": 0.0}, "non-finite number"),
        ({"chosen_score": 0.5}, "missing score"),
        ({"chosen": [assistant("a"), user("b")], "rejected": [assistant("c")]}, "no assistant answer"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [assistant("c")]}, "no assistant answer"),
        ({"prompt": [user("a"), assistant("b")]}, "no prompt"),
        ({"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}, "no prompt"),
        ({"chosen": "half a character: \ud83d"}, "broken text"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(change, reason):
    assert reason_for({**TEXT_ROW, **change}) == reason


def test_a_row_that_is_no_object_is_refused():
    assert reason_for(["why?", "because", "no"]) == "wrong type"


def test_a_named_column_must_be_there():
    with pytest.raises(BadRow, match=r"'good'; the row has: prompt, chosen, rejected"):
        convert(TEXT_ROW, chosen="good")


def test_identical_conversations_are_refused_as_such():
    whole = [user("a"), assistant("b")]
    assert reason_for({"chosen": whole, "rejected": whole}) == "identical pair"


def test_prompt_keys_ignore_white_space_and_nothing_else():
    assert prompt_key([user("why  not?\n")]) == prompt_key([user("why not?")])
    assert prompt_key([user("why not?")]) != prompt_key([user("Why not?")])
    assert prompt_key([user("a"), assistant("b")]) != prompt_key([user("a"), user("b")])
    assert 0 <= prompt_key([user("a")]) < 2**64


def test_every_row_of_hh_is_read_or_refused_for_a_known_reason(real_data):
    from rlhf.data.options import SourceConfig
    from rlhf.data.sources import open_source

    rows = list(open_source(SourceConfig(path=str(real_data("hh_harmless_base_test.jsonl.gz")))).rows())
    refused = {}
    for row in rows:
        try:
            record, shape = convert(row.value)
        except BadRow as fault:
            refused[row.line] = fault.reason
        else:
            assert shape == HUMAN_ASSISTANT
            assert record.prompt[-1]["role"] == "user"
            assert record.chosen[0]["role"] == record.rejected[0]["role"] == "assistant"
    assert len(rows) == 2312
    assert list(refused.values()) == ["empty text"] * 4
