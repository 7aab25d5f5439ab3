"""Rows as well-known data sets have them: each is read, or the message says which settings read it."""

import pytest

from rlhf.data.messages import BadRow
from rlhf.data.options import ColumnConfig, ExampleColumns, PromptColumns
from rlhf.data.records import to_conversations, to_example, to_prompt, to_records
from rlhf.data.shapes import TIE

HELPSTEER3 = {
    "context": [{"role": "user", "content": "rain?"}],
    "response1": "Yes.",
    "response2": "No.",
    "overall_preference": -2,
}
PKU = {"prompt": "rain?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1, "safer_response_id": 0}
NECTAR = {
    "prompt": "\n\nHuman: rain?\n\nAssistant: ",
    "answers": [
        {"answer": "No.", "model": "a", "rank": 3.0},
        {"answer": "Yes.", "model": "b", "rank": 1.0},
        {"answer": "Perhaps.", "model": "c", "rank": 2.0},
    ],
    "turns": 1,
}
ULTRAFEEDBACK = {
    "source": "x",
    "instruction": "rain?",
    "completions": [{"response": "No.", "overall_score": 2.5}, {"response": "Yes.", "overall_score": "8.0"}],
}


def pairs(row, **columns):
    records, _ = to_records(row, ColumnConfig(**columns), row_id="x:1", source="x")
    return [(each.prompt[-1]["content"], each.chosen[0]["content"], each.rejected[0]["content"]) for each in records]


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (
            HELPSTEER3,
            "HelpSteer3: set data.columns.prompt=context data.columns.chosen=response1 data.columns.rejected=response2 "
            "data.columns.strength=overall_preference",
        ),
        (
            PKU,
            "PKU-SafeRLHF: set data.columns.chosen=response_0 data.columns.rejected=response_1 "
            "data.columns.better=better_response_id",
        ),
        (ULTRAFEEDBACK, "UltraFeedback: set data.columns.prompt=instruction"),
        ({"question": "rain?", "chosen": "Yes.", "rejected": "No."}, "set data.columns.prompt=question"),
        ({"prompt": "rain?", "response": "Yes.", "helpfulness": 4}, r"preference/preference.jsonl.gz"),
        ({"messages": [{"role": "user", "content": "rain?"}]}, "as SFT reads them (--kind conversations)"),
    ],
)
def test_a_known_shape_is_named_with_the_settings_that_read_it(row, advice):
    with pytest.raises(BadRow) as caught:
        pairs(row)
    assert advice in caught.value.detail
    given = [part.removeprefix("data.columns.") for part in advice.split() if part.startswith("data.")]
    settings = dict(part.split("=") for part in given)
    if settings:
        assert ("rain?", "Yes.", "No.") in pairs(row, **settings)


def test_a_signed_strength_says_which_answer_is_better_and_is_the_margin():
    columns = {"prompt": "context", "chosen": "response1", "rejected": "response2", "strength": "overall_preference"}
    [record], _ = to_records(HELPSTEER3, ColumnConfig(**columns), row_id="x:1", source="x")
    assert record.margin == 2
    assert pairs({**HELPSTEER3, "overall_preference": 3}, **columns) == [("rain?", "No.", "Yes.")]
    with pytest.raises(BadRow) as caught:
        pairs({**HELPSTEER3, "overall_preference": 0}, **columns)
    assert caught.value.reason == TIE


@pytest.mark.parametrize("second", [1, "1", "b", "response_1", "model_b"])
def test_the_better_answer_is_named_by_number_letter_or_column(second):
    columns = {"chosen": "response_0", "rejected": "response_1", "better": "better_response_id"}
    assert pairs({**PKU, "better_response_id": second}, **columns) == [("rain?", "Yes.", "No.")]
    with pytest.raises(BadRow, match="better is 7, expected 0 or 1"):
        pairs({**PKU, "better_response_id": 7}, **columns)
    for tie in ("tie", "tie (bothbad)", -1):
        with pytest.raises(BadRow, match=TIE):
            pairs({**PKU, "better_response_id": tie}, **columns)


def test_the_best_of_ranked_answers_is_paired_with_every_other():
    assert pairs(NECTAR) == [("rain?", "Yes.", "No."), ("rain?", "Yes.", "Perhaps.")]


def test_ratings_of_answers_become_scores():
    [record], shape = to_records(ULTRAFEEDBACK, ColumnConfig(prompt="instruction"), row_id="x:1", source="x")
    assert (record.chosen_score, record.rejected_score, shape) == (8.0, 2.5, "rated answers")
    equal = {**ULTRAFEEDBACK, "completions": [{"response": text, "score": 3} for text in ("a", "b")]}
    with pytest.raises(BadRow, match=TIE):
        pairs(equal, prompt="instruction")


def test_lists_of_texts_pair_every_chosen_with_every_rejected():
    row = {"prompt": "rain?", "chosen": ["Yes."], "rejected": ["No.", "Snow.", "Tea."], "subset": "weather"}
    assert [rejected for _, _, rejected in pairs(row)] == ["No.", "Snow.", "Tea."]
    [first, *_], _ = to_records(row, ColumnConfig(group="subset"), row_id="x:1", source="x")
    assert first.unread == ()
    found = to_conversations(row, ColumnConfig())
    assert [len(found[side]) for side in ("chosen", "rejected")] == [1, 3]


@pytest.mark.parametrize("suffix", ["{}_rating", "rating_{}", "{}-rating", "{}_avg_rating", "score_{}"])
def test_ratings_beside_the_answers_are_scores(suffix):
    row = {"prompt": "rain?", "chosen": "Yes.", "rejected": "No."}
    row |= {suffix.format("chosen"): 4, suffix.format("rejected"): 1.5}
    [record], _ = to_records(row, ColumnConfig(), row_id="x:1", source="x")
    assert (record.chosen_score, record.rejected_score, record.unread) == (4.0, 1.5, ())


def test_sharegpt_pairs_have_their_prompt_in_a_conversation():
    row = {
        "conversations": [{"from": "human", "value": "rain?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    assert pairs(row) == [("rain?", "Yes.", "No.")]


def test_an_input_column_belongs_to_the_prompt_and_a_system_column_stands_before_it():
    row = {"instruction": "Answer.", "input": "rain?", "output": "Yes.", "system": "be brief"}
    columns = ExampleColumns(prompt="instruction", completion="output")
    record, _ = to_example(row, columns, labeled=False, row_id="x:1", source="x")
    assert record.unread == ("input", "system")
    columns = ExampleColumns(prompt="instruction", completion="output", input="input", system="system")
    record, _ = to_example(row, columns, labeled=False, row_id="x:1", source="x")
    assert [message["content"] for message in record.prompt] == ["be brief", "Answer.\n\nrain?"]
    assert record.unread == ()
    for empty in (None, "", "  "):
        record, _ = to_example({**row, "input": empty, "system": empty}, columns, labeled=False, row_id="", source="")
        assert [message["content"] for message in record.prompt] == ["Answer."]
    prompt, _ = to_prompt(row, PromptColumns(prompt="instruction", input="input"), row_id="", source="")
    assert prompt.prompt[0]["content"] == "Answer.\n\nrain?"
    with pytest.raises(BadRow, match="input a number"):
        to_prompt({**row, "input": 3}, PromptColumns(prompt="instruction", input="input"), row_id="", source="")


def test_alpaca_rows_are_named_with_their_settings():
    row = {"instruction": "Answer.", "input": "rain?", "output": "Yes."}
    with pytest.raises(BadRow, match=r"Alpaca: set data\.columns\.prompt=instruction data\.columns\.input=input"):
        to_example(row, ExampleColumns(), labeled=False, row_id="", source="")


def test_ratings_of_one_and_the_same_text_are_no_pair():
    answers = [{"response": text, "score": score} for text, score in (("a", 3), ("a ", 2), ("a", 1))]
    with pytest.raises(BadRow) as caught:
        pairs({**ULTRAFEEDBACK, "completions": answers}, prompt="instruction")
    assert caught.value.reason == "identical pair"


@pytest.mark.parametrize("second", [1.0, "1.0", True])
def test_the_better_answer_may_be_a_whole_number_of_any_kind(second):
    columns = {"chosen": "response_0", "rejected": "response_1", "better": "better_response_id"}
    assert pairs({**PKU, "better_response_id": second}, **columns) == [("rain?", "Yes.", "No.")]
    first = False if second is True else type(second)("0.0")
    assert pairs({**PKU, "better_response_id": first}, **columns) == [("rain?", "No.", "Yes.")]
    with pytest.raises(BadRow, match=TIE):
        pairs({**PKU, "better_response_id": -1.0}, **columns)
