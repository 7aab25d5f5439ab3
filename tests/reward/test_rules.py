"""Rewards from rules: texts, numbers, forms."""

import time
from fractions import Fraction

import pytest

from reward.rules import final_answer, has_form, number_of, same_number, same_text

GSM8K = "He has 3 boxes of 6 eggs.\nHe sold 3 * 6 = <<3*6=18>>18 eggs.\n#### 18"


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (GSM8K, "18", 18),
        ("#### 1,000 apples, of 2,000", "1,000", 1000),
        ("first 3, then 4.5", "4.5", Fraction(9, 2)),
        (r"so \boxed{\frac{1}{2}} of 10", r"\frac{1}{2}", Fraction(1, 2)),
        (r"\boxed{1} no, \boxed{-\dfrac{3}{4}}", r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\boxed{x = 18\text{ km}}", r"x = 18\text{ km}", 18),
        (r"\boxed{f(x)^{2}}", "f(x)^{2}", None),
        ("The answer is 5, because 2 + 3 = 5 and not 6", "5", 5),
        ("Answer: 12 %. Checked 3 times", "12", 12),
        ("answer is: Paris", "Paris", None),
        ("5-3", "3", 3),
        ("minus: -3", "-3", -3),
        ("\u22127", "\u22127", -7),
        ("about 1.5e3", "1.5e3", 1500),
        ("no number", "no number", None),
        ("", "", None),
        ("1/0", "1/0", None),
        ("9e999999999", "9e999999999", None),
        pytest.param("9" * 5000, "9" * 5000, None, id="5000 digits"),
        pytest.param("1/" + "3" * 4400, "1/" + "3" * 4400, None, id="a fraction of 4400 digits"),
        (r"\boxed{never closed 4", "4", 4),
    ],
)
def test_the_final_answer_of_a_text_and_its_value(text, answer, value):
    assert final_answer(text).strip() == answer
    assert number_of(final_answer(text)) == value


@pytest.mark.parametrize(
    ("response", "right", "reward"),
    [
        ("#### 18.0", GSM8K, 1.0),
        ("it is $18", GSM8K, 1.0),
        ("it is 18 at first, then 19", GSM8K, 0.0),
        ("1,000", 1000, 1.0),
        (".5", "1/2", 1.0),
        (r"\boxed{x^2}", "2", 0.0),
        (r"\boxed{X^2}", "x^2", 1.0),
        ("", "", 0.0),
        ("yes", None, None),
        ("0.1", "0.10000000000000000001", 0.0),
    ],
)
def test_numbers_are_the_same_by_value(response, right, reward):
    assert same_number(["q"], [response], answer=[right]) == [reward]


def test_texts_are_the_same_up_to_case_and_white_space():
    responses = [" New  York\n", "York", "a"]
    assert same_text(["q"] * 3, responses, answer=["new york", "new york", None]) == [1.0, 0.0, None]


def test_a_form_is_that_of_the_whole_response():
    responses = ["<think>a\nb</think>\n4", "4", "<think></think>4", "x <think>a</think> 4"]
    assert has_form(["q"] * 4, responses) == [1.0, 0.0, 0.0, 0.0]
    assert has_form(["q"] * 2, ["42", "42 apples"], pattern=r"\d+") == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [r"\boxed{1" + " " * 50_000 + "1}", "1" * 50_000, "answer " * 20_000, "1,111" * 20_000],
    ids=["spaces", "digits", "words", "thousands"],
)
def test_a_model_that_repeats_itself_keeps_nobody_waiting(text):
    began = time.process_time()
    assert same_number(["q"], [text], answer=["5"]) == [0.0]
    assert time.process_time() - began < 2
