"""Answers graded one by one: what the judge sees, how grades add up, and the files that MT-Bench's own tools read."""

import json
import re

import numpy as np
import pytest
from rich.console import Console

from launch.cli import main
from policy.grading.config import GradingConfig
from policy.grading.questions import grade, question
from policy.grading.results import read_grading
from policy.grading.run import grade_answers
from policy.judging.config import JudgeConfig
from rlhf.core.errors import DataError

CATEGORIES = ["writing", "math", "coding", "stem"]
QUESTIONS = [
    {
        "question_id": 81 + number,
        "category": CATEGORIES[number % 4],
        "turns": [f"first {number}?", f"second {number}?"],
        **({"reference": [f"right {number}", f"also right {number}"]} if number % 4 in (1, 3) else {}),
    }
    for number in range(8)
]
"""Two of each category; math has references, stem too, which a judge is not to see."""


def last_answer(text):
    return text.rpartition("### Assistant:\n")[2].partition("\n")[0]


def grades_it(text):
    """The grade that the answer asks for, such as "give 7"."""
    wanted = re.search(r"give (\S+)", last_answer(text))[1]
    return f"I thought of [[1]] at first. [[{wanted}]]"


@pytest.fixture
def files(tmp_path):
    """``files(first, second)``: questions, and answers of two models that ask for these grades in each turn."""
    questions = tmp_path / "question.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def write(name, turns):
        rows = [
            {"question_id": row["question_id"], "answer_id": "x", "model_id": name, "tstamp": 0.0,
             "choices": [{"index": 0, "turns": [f"give {grade} for {number}" for grade in turns(number)]}]}
            for number, row in enumerate(QUESTIONS)
        ]  # fmt: skip
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return questions, write


def graded(server, files, folder, answers, **changes):
    judge = {"url": server.url, "model": "some/judge", "wait_seconds": 0.01, "timeout_seconds": 0.4, "concurrency": 3}
    given = {"questions": files[0], "judge": JudgeConfig(**{**judge, **changes.pop("judge", {})}), **changes}
    return grade_answers(GradingConfig(output=folder, answers=answers, **given), Console(quiet=True))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grades_by_model_turn_and_category_equal_hand_calculations(stub, files, tmp_path):
    answers = {"old": files[1]("old", lambda n: (4, 2)), "new": files[1]("new", lambda n: (5 + n % 4, 3))}
    found = graded(stub(grades_it), files, tmp_path / "out", answers)
    old, new = found.models
    assert (old.score.value, old.score.low, old.gain) == (3, 3, None)
    assert [turn.value for turn in new.by_turn] == [6.5, 3]
    assert {name: each.value for name, each in new.by_category.items()} == {
        "writing": 4, "math": 4.5, "coding": 5, "stem": 5.5,
    }  # fmt: skip
    assert found.categories == ("writing", "math", "coding", "stem")
    values = np.array([(5 + n % 4 + 3) / 2 for n in range(8)])
    assert new.score.value == values.mean() == 4.75 and new.gain.value == 1.75
    half = 2.3646242510 * values.std(ddof=1) / np.sqrt(8)  # Student's t, 7 degrees of freedom
    assert new.gain.low == pytest.approx(1.75 - half) and new.score.high == pytest.approx(4.75 + half)
    assert min(each.low for each in new.by_category.values()) >= 1, "intervals of two questions stay on the scale"
    assert read_grading(tmp_path / "out") == found
    assert (tmp_path / "out" / "radar.svg").read_text().lstrip().startswith("<?xml")
    items = lines(tmp_path / "out" / "items.jsonl")
    assert len(items) == 32 and items[0] | {"reply": ""} == {
        "id": "81", "turn": 1, "category": "writing", "model": "old", "grade": 4, "reply": "",
    }  # fmt: skip


def test_judgments_are_those_that_show_result_of_fastchat_reads(stub, files, tmp_path):
    """Its means: over all lines of a model whose score is not -1, by turn."""
    hides = lambda text: "no" if last_answer(text) == "give 9 for 3" else grades_it(text)  # noqa: E731
    answers = {"m": files[1]("m", lambda n: (n + 1, 9))}
    graded(stub(hides), files, tmp_path / "out", answers)
    rows = lines(tmp_path / "out" / "model_judgment" / "some_judge_single.jsonl")
    assert rows[0].keys() == {
        "question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp",
    }  # fmt: skip
    assert [row["score"] for row in rows if row["turn"] == 1] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["score"] for row in rows if row["turn"] == 2] == [9, 9, 9, -1, 9, 9, 9, 9]
    kinds = {(row["question_id"], row["turn"]): row["judge"] for row in rows}
    assert kinds[81, 1] == ["some/judge", "single-v1"] and kinds[81, 2] == ["some/judge", "single-v1-multi-turn"]
    assert kinds[82, 1][1] == "single-math-v1" and kinds[82, 2][1] == "single-math-v1-multi-turn"
    assert kinds[84, 1][1] == "single-v1", "stem is judged without its reference"


def test_a_first_turn_is_judged_alone_and_a_second_within_the_conversation():
    first = question("", [("one?", "1")])[-1]["content"]
    assert "### User:\none?" in first and "reference" not in first.lower() and "[[grade]]" in first
    both = question("", [("one?", "1"), ("two?", "2")])[-1]["content"]
    assert both.index("one?") < both.index("two?") and both.rindex("### Assistant:\n2") and "last question" in both


def test_the_judge_sees_references_up_to_the_turn_that_it_grades():
    turns, right = [("one?", "1"), ("two?", "2")], ("eins", "zwei")
    assert "zwei" not in question("", turns[:1], right)[-1]["content"]
    second = question("", turns, right)[-1]["content"]
    places = [second.index(text) for text in ("Reference answer:\neins", "Reference answer:\nzwei", "one?\n\n### A")]
    assert places == sorted(places)
    assert "zwei" in question("", turns, ("eins", "zwei", "drei"))[-1]["content"]
    assert "eins" in question("", turns, ("eins",))[-1]["content"]


def write_references(path, rows):
    rows = [{"question_id": row["question_id"], "choices": [{"turns": ["of the file", "x"]}]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_references_come_from_their_own_file_where_there_is_one(stub, files, tmp_path):
    path = write_references(tmp_path / "gpt-4.jsonl", QUESTIONS)
    server = stub(grades_it)
    found = graded(server, files, tmp_path / "out", {"m": files[1]("m", lambda n: (5, 5))}, references=path)
    seen = [text for text in server.asked if "of the file" in text]
    assert len(seen) == 8 and not any("right 5" in text for text in server.asked), "math and coding, both turns"
    assert not found.notes


def test_a_question_that_a_file_of_references_lacks_is_refused(stub, files, tmp_path):
    path = write_references(tmp_path / "gpt-4.jsonl", [*QUESTIONS[:5], QUESTIONS[7]])
    server = stub(grades_it)
    with pytest.raises(DataError, match=r"gpt-4\.jsonl: no reference answer to 2 questions of math, .* as 86 \(math\)"):
        graded(server, files, tmp_path / "out", {"m": files[1]("m", lambda n: (5, 5))}, references=path)
    assert not server.asked


def test_questions_that_are_graded_without_a_reference_are_counted(stub, files, tmp_path):
    found = graded(stub(grades_it), files, tmp_path / "out", {"m": files[1]("m", lambda n: (5, 5))})
    (note,) = found.notes
    assert note.startswith("2 questions of math, reasoning, coding were graded without a reference answer")


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("[[7]]", 7.0),
        ("Rating: [[7.5]]", 7.5),
        ("[[3]] would be harsh. So: [[8]]", 8.0),
        ("[[ 8 / 10 ]]", 8.0),
        ("Rating: [6]", 6.0),
        ("[1] says so. [[4]]", 4.0),
        ("It is right.\n\n**[8/10]**.", 8.0),
        ("My score is [3], for x[9] fails.", 3.0),
        ("The code uses x[3] and then y[1]...", None),
        ("see [2]", None),
        ("upgrade[4] is missing", None),
        ("<think>[[2]]</think> fine [[10]]", 10.0),
        ("<think>[[2]] or", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("7", None),
        ("", None),
    ],
)
def test_the_last_grade_counts(reply, value):
    if value is None:
        with pytest.raises(ValueError, match=r"grade|thoughts"):
            grade(reply)
    else:
        assert grade(reply) == value


@pytest.mark.parametrize(("reply", "value"), [("[[7]] as it", 7.0), ("Rating: [7]", None), ("x\n[7]", None)])
def test_of_a_reply_that_was_cut_double_brackets_alone_count(reply, value):
    if value is None:
        with pytest.raises(ValueError, match="without a grade"):
            grade(reply, was_cut=True)
    else:
        assert grade(reply, was_cut=True) == value


def test_bad_moods_are_outlived_and_nothing_is_asked_twice(stub, files, tmp_path):
    answers = {"m": files[1]("m", lambda n: (5, 6))}
    server = stub(grades_it, "429", "500", "garbage", "slow", "html", *["well"] * 4, *["500"] * 200)
    with pytest.raises(DataError, match=r"of 16 answers have no verdict \(.*status 500"):
        graded(server, files, tmp_path / "out", answers, judge={"tries": 2})
    kept = len(lines(tmp_path / "out" / "judge.jsonl"))
    assert kept and not (tmp_path / "out" / "evaluation.json").exists()
    server.moods.clear()
    asked = sum(server.asked.values())
    found = graded(server, files, tmp_path / "out", answers)
    assert found.models[0].score.value == 5.5 and sum(server.asked.values()) == asked + 16 - kept


def test_a_question_without_a_grade_is_left_out_and_counted(stub, files, tmp_path):
    hides = lambda text: "no" if last_answer(text) == "give 9 for 3" else grades_it(text)  # noqa: E731
    found = graded(stub(hides), files, tmp_path / "out", {"m": files[1]("m", lambda n: (1 + n, 9))})
    (only,) = found.models
    assert (only.questions, only.left_out) == (8, 1)
    assert only.score.value == pytest.approx(np.mean([(1 + n + 9) / 2 for n in range(8) if n != 3]))
    assert found.notes[0].startswith("1 of 16 answers have no verdict (a reply without a grade: 'no'")


def test_answers_that_hold_their_questions_are_graded_too(stub, tmp_path):
    rows = [
        {"instruction": f"q {n}", "output": f"give {n + 1}", "dataset": "koala", "generator": "g"} for n in range(4)
    ]
    (tmp_path / "outputs.json").write_text(json.dumps(rows))
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    (tmp_path / "responses.jsonl").write_text(json.dumps({"prompt": talk, "response": "give 3"}) + "\n")
    server = stub(grades_it)
    found = graded(server, (None, None), tmp_path / "out", {"g": tmp_path / "outputs.json"})
    assert found.models[0].score.value == 2.5 and found.categories == ("koala",)
    assert graded(server, (None, None), tmp_path / "2", {"g": tmp_path / "responses.jsonl"}).models[0].score.value == 3
    assert any("### System:\nbe brief" in text for text in server.asked)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 99, "choices": [{"turns": ["a", "b"]}]}, "question_id = 99: no such question in"),
        ({"question_id": 81, "choices": [{"turns": ["a"]}]}, "1 turns, where the question has 2"),
        ({"question_id": 81, "choices": [{"turns": ["a", "b"]}] * 2}, "2 choices; expected one answer"),
        ({"question_id": 81, "choices": [{"turns": "ab"}]}, "expected choices"),
        ({"question_id": 81}, "expected question_id and choices, instruction and output"),
        ([], "expected question_id and choices, instruction and output"),
    ],
)
def test_answers_of_another_shape_are_refused(files, tmp_path, capsys, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    judge = ["--judge-url", "http://127.0.0.1:9", "--judge-model", "m"]
    given = ["--answers", f"m={tmp_path}/a.jsonl", "--questions", str(files[0]), "-o", str(tmp_path / "out")]
    assert main(["evaluate", "grades", *given, *judge]) == 2
    assert message in capsys.readouterr().err


def test_models_that_answered_other_questions_are_refused(stub, files, tmp_path):
    first, second = (files[1](name, lambda n: (1, 2)) for name in "ab")
    second.write_text("".join(line + "\n" for line in second.read_text().splitlines()[1:]))
    with pytest.raises(DataError, match="answers of a and b: to other questions, such as 81"):
        graded(stub(grades_it), files, tmp_path / "out", {"a": first, "b": second})


def test_the_command(stub, files, tmp_path, capsys):
    server = stub(grades_it)
    answers = [
        f"--answers={name}={files[1](name, lambda n, own=own: (own, own + n % 2))}"
        for name, own in (("a", 3), ("b", 6))
    ]
    judge = ["--judge-url", server.url, "--judge-model", "m", "--prices", "1", "2"]
    assert (
        main(["evaluate", "grades", *answers, "--questions", str(files[0]), *judge, "-o", str(tmp_path / "out")]) == 0
    )
    said = capsys.readouterr().out
    assert (
        "32 questions to the judge" in said and "gain over a" in said and "+3.00" in said and "humanities" not in said
    )
    assert main(["evaluate", "grades", "--answers", "a", *judge, "-o", str(tmp_path / "out")]) == 2
    assert "--answers a: expected NAME=FILE" in capsys.readouterr().err
