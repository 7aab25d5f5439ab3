"""A row of a table says all that its function takes, of every kind of parameter, and values are checked without it."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from annotated_types import Gt

from rlhf.core.table import REQUIRED, KindError, Parameter, Row, parameter_values

Positive = Annotated[float, Gt(0)]


def whole_default(chosen, rejected, *, beta: float = 1): ...
def whole_number(chosen, rejected, *, steps: int = 3): ...
def switch(chosen, rejected, *, centered: bool = True): ...
def required(chosen, rejected, *, beta: float): ...
def absent(chosen, rejected, *, cap: float | None = None): ...
def choice(chosen, rejected, *, form: Literal["a", "b"] = "a"): ...
def plain(chosen, rejected): ...
def positional(chosen, rejected, beta: float = 1.0): ...


KINDS = {
    whole_default: {"beta": Parameter(Positive, 1)},
    whole_number: {"steps": Parameter(Annotated[int, Gt(0)], 3)},
    switch: {"centered": Parameter(bool, True)},
    required: {"beta": Parameter(Positive)},
    absent: {"cap": Parameter(Positive | None, None)},
    choice: {"form": Parameter(Literal["a", "b"], "a")},
}


def row(function, parameters):
    return Row(f"{__name__}:{function.__name__}", inputs=("chosen", "rejected"), parameters=parameters)


@pytest.mark.parametrize("function", KINDS, ids=lambda function: function.__name__)
def test_a_hyper_parameter_of_any_kind_must_be_in_the_row(function):
    row(function, KINDS[function]).check_against(function)
    (name,) = KINDS[function]
    with pytest.raises(TypeError, match=f"{name}.* is not in the row"):
        row(function, {}).check_against(function)


@pytest.mark.parametrize(
    ("function", "parameters", "fault"),
    [
        (whole_default, {"beta": Parameter(Positive, 2.0)}, "beta: float = 1 stands there as"),
        (whole_default, {"beta": Parameter(Positive)}, "beta: float = 1 stands there as"),
        (switch, {"centered": Parameter(bool, 1)}, "centered: bool = True stands there as"),
        (whole_number, {"steps": Parameter(float, 3)}, "steps: int = 3 stands there as"),
        (absent, {"cap": Parameter(Positive, None)}, "cap: .* stands there as"),
        (choice, {"form": Parameter(Literal["a"], "a")}, "form: .* stands there as"),
        (plain, {"beta": Parameter(Positive, 1.0)}, "beta is no parameter"),
        (positional, {"beta": Parameter(Positive, 1.0)}, "not keyword-only"),
    ],
)
def test_a_row_that_says_something_else_than_the_function_is_refused(function, parameters, fault):
    with pytest.raises(TypeError, match=fault):
        row(function, parameters).check_against(function)


def test_inputs_that_the_function_does_not_take_are_refused_and_the_first_use_checks():
    wrong = Row("math:dist", inputs=("p", "q", "margins"))
    with pytest.raises(TypeError, match="margins is no parameter of the function"):
        _ = wrong.implementation
    assert Row("math:dist", inputs=("p", "q")).implementation([0, 3], [4, 0]) == 5


TABLE = {
    "plain": Row("m:plain"),
    "scaled": Row("m:scaled", parameters={"beta": Parameter(Positive, 1), "steps": Parameter(int, 3)}),
    "strict": Row("m:strict", parameters={"cap": Parameter(Positive | None, None), "width": Parameter(Positive)}),
    "switched": Row("m:switched", parameters={"on": Parameter(bool, False), "form": Parameter(Literal["a", "b"], "a")}),
}


def test_what_is_not_given_has_its_default_whatever_its_type():
    assert parameter_values(TABLE, "scaled", {}, noun="loss") == {"beta": 1, "steps": 3}
    assert parameter_values(TABLE, "scaled", {"beta": 2}, noun="loss") == {"beta": 2.0, "steps": 3}
    assert parameter_values(TABLE, "strict", {"width": 0.5}, noun="loss") == {"cap": None, "width": 0.5}


@pytest.mark.parametrize(
    ("kind", "given", "problem"),
    [
        ("plane", {}, ("kind", "plane", "no such loss (did you mean plain?); there are plain, scaled, ")),
        ("plain", {"beta": 1.0}, ("parameters.beta", 1.0, "kind = plain takes no parameters; beta belongs to scaled")),
        ("plain", {"x": 1.0}, ("parameters.x", 1.0, "kind = plain takes no parameters")),
        ("scaled", {"bta": 1.0}, ("parameters.bta", 1.0, "unknown (did you mean beta?): kind = scaled takes beta")),
        ("strict", {}, ("parameters.width", REQUIRED, "required by kind = strict")),
        ("strict", {"width": 0.0}, ("parameters.width", 0.0, "Input should be greater than 0")),
        ("strict", {"width": 1.0, "cap": "x"}, ("parameters.cap", "x", "Input should be a valid number")),
        ("strict", {"width": float("nan")}, ("parameters.width", None, "Input should be a finite number")),
        ("scaled", {"beta": True}, ("parameters.beta", True, "Input should be a valid number")),
        ("scaled", {"beta": [1.0]}, ("parameters.beta", [1.0], "Input should be a valid number")),
        ("scaled", {"steps": 1.5}, ("parameters.steps", 1.5, "Input should be a valid integer")),
        ("switched", {"on": 1}, ("parameters.on", 1, "Input should be a valid boolean")),
        ("switched", {"form": "c"}, ("parameters.form", "c", "Input should be 'a' or 'b'")),
    ],
)
def test_a_value_that_a_kind_does_not_take_is_named(kind, given, problem):
    with pytest.raises(KindError) as caught:
        parameter_values(TABLE, kind, given, noun="loss")
    ((key, value, words),) = caught.value.problems
    assert key == problem[0] and words.startswith(problem[2])
    assert value is problem[1] or value == problem[1] or value != value


def test_all_problems_of_a_kind_are_named_at_once():
    with pytest.raises(KindError, match=r"parameters.y = 1: .*; parameters.cap = -1: .*; parameters.width: required"):
        parameter_values(TABLE, "strict", {"y": 1, "cap": -1}, noun="loss")


def test_a_subclass_adds_arguments_of_its_own():
    @dataclass(frozen=True)
    class Pairwise(Row):
        @property
        def arguments(self):
            return super().arguments | {"rejected"}

    Pairwise("m:plain", inputs=("chosen",)).check_against(plain)
