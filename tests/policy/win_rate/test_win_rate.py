"""Two files of answers and a judge: a function, a reward model, an endpoint that behaves badly."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from launch.cli import main
from policy.judging.asking import ask_all, cost
from policy.judging.config import JudgeConfig
from policy.judging.endpoint import Refused
from policy.win_rate.config import WinRateConfig
from policy.win_rate.questions import question, verdict
from policy.win_rate.run import by_reward, compare, read_comparison, read_pairs, win_rate_table
from rlhf.config import load_config
from rlhf.core.errors import ConfigError, DataError

QUESTIONS = [f"question {number}" for number in range(6)]


@pytest.fixture
def files(tmp_path):
    """Answers of two models; those of the first are the better ones to even questions."""

    def write(name, texts, questions=QUESTIONS):
        path = tmp_path / f"{name}.json"
        rows = [
            {"instruction": asked, "output": text, "generator": name}
            for asked, text in zip(questions, texts, strict=True)
        ]
        path.write_text(json.dumps(rows))
        return path

    own = write("new", ["good" if number % 2 == 0 else "bad" for number in range(6)])
    other = write("old", ["bad" if number % 2 == 0 else "good" for number in range(6)][::-1], QUESTIONS[::-1])
    return own, other, write


def says_which_is_good(text):
    return "[[A]]" if text.partition("# Answer A\n\n")[2].partition("\n")[0] == "good" else "B."


def judge(server, **changes):
    given = {"url": server.url, "model": "m", "wait_seconds": 0.01, "timeout_seconds": 0.4, "concurrency": 3}
    return JudgeConfig(**{**given, **changes})


def judged_by(server, files, folder, **changes):
    config = WinRateConfig(output=folder, outputs=files[0], reference=files[1], judge=judge(server, **changes))
    return compare(config, Console(quiet=True))


def test_each_pair_is_judged_in_both_orders(stub, files, tmp_path):
    server = stub(says_which_is_good)
    found = judged_by(server, files, tmp_path / "out")
    assert (found.name, found.reference, found.judge, found.rate.value, found.rate.ties) == ("new", "old", "m", 0.5, 0)
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [row["preference"] for row in items] == [1, 0, 1, 0, 1, 0]
    assert [row["id"] for row in items] == [f"new.json:{number}" for number in range(1, 7)]
    assert items[0]["replies"] == ["[[A]]", "B."]
    assert len(server.asked) == 12
    assert read_comparison(tmp_path / "out") == found


def test_annotations_are_those_of_alpaca_eval(stub, files, tmp_path):
    judged_by(stub(says_which_is_good), files, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [2, 1, 2, 1, 2, 1], "2 is for output_2"
    assert rows[0] == {
        "instruction": "question 0", "output_1": "bad", "generator_1": "old", "output_2": "good", "generator_2": "new",
        "annotator": "m", "preference": 2,
    }  # fmt: skip


def test_a_judge_who_likes_the_first_place_decides_nothing(stub, files, tmp_path):
    assert judged_by(stub(lambda text: "A"), files, tmp_path / "out").rate.ties == 6


def test_an_endpoint_in_every_bad_mood_is_asked_again(stub, files, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = stub(says_which_is_good, "429", "500", "garbage", "slow", "both", "html", "nothing")
    found = judged_by(server, files, tmp_path / "out", key_variable="MY_KEY")
    assert found.rate.value == 0.5 and found.left_out == 0
    assert sum(server.asked.values()) == 12 + 7
    assert server.keys == {"Bearer secret"}
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_what_was_answered_is_kept_and_never_asked_twice(stub, files, tmp_path):
    server = stub(says_which_is_good, *["well"] * 5, *["500"] * 100)
    with pytest.raises(DataError, match=r"4 of 6 pairs .* \(status 500\), where 1 may stay .*the same command"):
        judged_by(server, files, tmp_path / "out", tries=2, concurrency=1)
    cache = tmp_path / "out" / "judge.jsonl"
    assert len(cache.read_text().splitlines()) == 5
    with cache.open("a") as handle:
        handle.write('{"key": "cut')
    server.moods.clear()
    answered = {text for text, count in server.asked.items() if count == 1}
    found = judged_by(server, files, tmp_path / "out", max_tokens=99)
    assert found.rate.value == 0.5 and all(server.asked[text] == 1 for text in answered)
    before = sum(server.asked.values())
    judged_by(server, files, tmp_path / "out")
    assert sum(server.asked.values()) == before


def test_a_verdict_that_cannot_be_read_is_counted_and_left_out(stub, files, tmp_path):
    def hides_one(text):
        return "I would rather not..." if "question 2" in text else says_which_is_good(text)

    server = stub(hides_one)
    found = judged_by(server, files, tmp_path / "out")
    assert (found.questions, found.left_out, found.rate.wins, found.rate.losses) == (6, 1, 2, 3)
    (note,) = found.notes
    assert note.startswith("1 of 6 pairs have no verdict (a reply without one verdict: 'I would rather not...'")
    assert "cut at judge.max_tokens = 2048" in note
    assert sum(server.asked.values()) == 10 + 2 * 3, "thrice, and not six times"
    rows = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows if row["preference"] is None] == ["new.json:3"]
    with pytest.raises(DataError, match=r"1 of 6 pairs have no verdict .* where 0 may stay without"):
        judged_by(server, files, tmp_path / "strict", tolerated=0.0)


@pytest.mark.parametrize(("share", "hidden", "passes"), [(0.4, 2, True), (0.4, 3, False), (0.05, 2, False)])
def test_so_many_may_stay_without_a_verdict(stub, files, tmp_path, share, hidden, passes):
    hides = lambda text: "?" if any(f"question {n}" in text for n in range(hidden)) else "A"  # noqa: E731
    if passes:
        assert judged_by(stub(hides), files, tmp_path / "out", tolerated=share).left_out == hidden
    else:
        with pytest.raises(DataError, match=f"{hidden} of 6 pairs have no verdict"):
            judged_by(stub(hides), files, tmp_path / "out", tolerated=share)


def test_a_question_that_is_refused_by_itself_is_left_out(stub, files, tmp_path):
    server = stub(says_which_is_good, "well", "400")
    found = judged_by(server, files, tmp_path / "out", concurrency=1)
    assert found.left_out == 1 and "status 400: too long" in found.notes[0]
    assert sum(server.asked.values()) == 12, "nothing is asked again that was refused"
    with pytest.raises(Refused, match="status 400: too long"):
        judged_by(stub(says_which_is_good, *["400"] * 99), files, tmp_path / "none", concurrency=1)


def test_a_refusal_ends_it_at_once_and_says_why(stub, files, tmp_path):
    server = stub(says_which_is_good, *["401"] * 100)
    with pytest.raises(Refused, match="status 401: who are you"):
        judged_by(server, files, tmp_path / "out", concurrency=1)
    assert sum(server.asked.values()) < 12


def test_an_address_where_nobody_is_ends_in_one_message(files, tmp_path):
    nobody = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", tries=2, wait_seconds=0.01)
    config = WinRateConfig(output=tmp_path, outputs=files[0], reference=files[1], judge=nobody)
    with pytest.raises(DataError, match=r"6 of 6 pairs have no verdict \(ConnectError.*\(judge\.tolerated\)$"):
        compare(config, Console(quiet=True))


def test_the_request_has_what_the_recipe_says(stub, files, tmp_path):
    server = stub(lambda text: "A")
    judged_by(server, files, tmp_path / "out", max_tokens=None, request={"max_completion_tokens": 9, "effort": "low"})
    assert server.bodies[0].keys() == {"model", "messages", "max_completion_tokens", "effort"}
    judged_by(server, files, tmp_path / "out")
    assert server.bodies[-1]["max_tokens"] == 2048 and server.bodies[-1]["temperature"] == 0
    assert len(server.bodies) == 24, "other requests are other questions"


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        ("A", 1.0),
        ("b", 0.0),
        ("**Tie**", 0.5),
        ("Verdict: A.", 1.0),
        ("It is a tie.", 0.5),
        ("B is a better answer", None),
        ("It is neither.\n\nA tie.", 0.5),
        ("I thought about it.\n**B**", 0.0),
        ("**Final verdict:** [A]", 1.0),
        ("A closer look shows that both answers are equally good.", None),
        ("I cannot say whether A is better.", None),
        ("Which is better?\nA?", None),
        ("[[B]]", 0.0),
        ("At first [[A]] seemed right, but A is wrong: [[B]]", 0.0),
        ("[[ tie ]]", 0.5),
        ("[[C]]", 0.5),
        ("A has more detail, B is right.\n\nB", 0.0),
        ("A is short. B is long.\nVerdict: **A**", 1.0),
        ("<think>[[B]] or A? B!</think>[[A]]", 1.0),
        ("<think>[[B]] it is", None),
        ("", None),
        ("A B", None),
        ("C", None),
        ("a better one", None),
    ],
)
def test_the_last_verdict_counts(reply, worth):
    if worth is None:
        with pytest.raises(ValueError, match="without"):
            verdict(reply)
    else:
        assert verdict(reply) == worth


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        ("[[B]]", 0.0),
        ("[[A]], since it", 1.0),
        ("Answer A starts with a definition and then goes on to", None),
        ("They differ.\n\nA", None),
        ("A tie", None),
    ],
)
def test_of_a_reply_that_was_cut_brackets_alone_count(reply, worth):
    if worth is None:
        with pytest.raises(ValueError, match="without one verdict"):
            verdict(reply, was_cut=True)
    else:
        assert verdict(reply, was_cut=True) == worth


def test_a_single_question_has_no_standard_error(stub, files, tmp_path):
    _, _, write = files
    own, other = (write(name, [name], ["why?"]) for name in ("longer", "short"))
    found = judged_by(stub(lambda text: "A"), (own, other), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["rate"]["standard_error"] is None
    assert win_rate_table(found).row_count == 2


def test_a_line_that_cannot_be_read_is_named(files, tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "resp')
    with pytest.raises(DataError, match=r"responses\.jsonl:2: unreadable row: not JSON"):
        read_pairs(path, files[1])


def test_the_cost_is_told_before(stub, files, tmp_path):
    pairs = read_pairs(*files[:2]).pairs
    asked = [question(pair, swapped=False) for pair in pairs]
    read = sum(len(message["content"]) for each in asked for message in each) // 4
    config = JudgeConfig(url="http://x", model="m", max_tokens=16, prices=(10.0, 30.0))
    assert cost(asked, config, known=2) == (
        f"6 questions to the judge (2 more are answered already): about {read:,} tokens to read, at most 96 to write: "
        f"{read * 10 / 1e6:.2f} to {(read * 10 + 96 * 30) / 1e6:.2f} at these prices"
    )
    without_limit = cost(asked, replace(config, max_tokens=None), known=0)
    assert "to write" not in without_limit
    assert without_limit.endswith(f"tokens to read: {read * 10 / 1e6:.2f} for these at these prices")
    server, said = stub(lambda text: "A"), []

    class Listening:
        def print(self, text, **_):
            said.append((text.partition(":")[0], len(server.bodies)))

    ask_all(judge(server), [[each] for each in asked], verdict, tmp_path, Listening(), "pairs")
    assert said[0] == ("6 questions to the judge (0 more are answered already)", 0), "before anything is asked"
    said.clear()
    ask_all(judge(server), [asked[:1], asked[:1], asked[1:]], verdict, tmp_path / "equal", Listening(), "pairs")
    assert said[0][0] == "6 questions to the judge (0 more are answered already)", "equal ones are asked once"


def test_a_function_judges(files, tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(
        "def good(prompts, responses): return [float(text == 'good') for text in responses]\n"
        "def nothing(prompts, responses): return [None] * len(responses)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert list(by_reward("judges:good")(read_pairs(*files[:2]).pairs).preferences) == [1, 0, 1, 0, 1, 0]
    with pytest.raises(DataError, match="judges:nothing: gave None or NaN"):
        by_reward("judges:nothing")(read_pairs(*files[:2]).pairs)


def test_files_of_other_questions_or_shapes_are_refused(files, tmp_path):
    own, _, write = files
    with pytest.raises(DataError, match=r"other questions: 6 are in the first alone, 1 in the second"):
        read_pairs(own, write("third", ["x"], ["else"]))
    with pytest.raises(DataError, match=r"a second answer to one question"):
        read_pairs(own, write("fourth", ["x", "y"], ["else", "else"]))
    (tmp_path / "bad.json").write_text('[{"question": "x"}]')
    with pytest.raises(DataError, match=r"bad\.json:1: expected instruction and output, or prompt and response"):
        read_pairs(own, tmp_path / "bad.json")


def test_the_command(stub, files, tmp_path, capsys, monkeypatch):
    sides = ["--outputs", str(files[0]), "--reference", str(files[1])]
    given = ["evaluate", "win-rate", *sides, "-o", str(tmp_path / "out")]
    server = stub(says_which_is_good)
    monkeypatch.setenv("MY_KEY", "k")
    address = ["--judge-url", server.url, "--key-variable", "MY_KEY"]
    more = ["--judge-model", "m", "--prices", "1", "2", "--request", "effort=low", "--request", "temperature=1"]
    assert main([*given, *address, *more]) == 0
    printed = capsys.readouterr().out
    assert "12 questions to the judge" in printed and "new against old, 6 questions" in printed and "50.0%" in printed
    assert server.keys == {"Bearer k"}
    assert server.bodies[0]["effort"] == "low" and server.bodies[0]["temperature"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one judge: reward, or judge.url with judge.model"),
        (["--judge", "m:f", "--judge-url", "http://x", "--judge-model", "m"], "expected one judge"),
        (["--judge-url", "http://x"], "url needs model: the name that the endpoint has"),
        (
            ["--judge-url", "x", "--judge-model", "m"],
            "url = x: expected the address of a server, such as https://api.openai.com/v1",
        ),
        (["--judge-url", "http://me:pw@x", "--judge-model", "m"], " url: expected the address of a server"),
        (["--judge", "m:f", "--request", "effort"], "--request effort: expected NAME=VALUE"),
        (["--judge", "m:f", "--tolerated", "1"], "tolerated = 1.0: Input should be less than 1"),
    ],
)
def test_wrong_judges_are_refused_in_one_message(files, tmp_path, capsys, words, message):
    sides = ["--outputs", str(files[0]), "--reference", str(files[1])]
    assert main(["evaluate", "win-rate", *sides, "-o", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_it_is_a_stage(stub, files, tmp_path):
    settings = [f"output={tmp_path}/out", f"outputs={files[0]}", f"reference={files[1]}"]
    config = load_config(WinRateConfig, [], [*settings, "judge.url=http://x/v1", "judge.model=m"], program="test")
    assert config.judge.request == {"temperature": 0}
    with pytest.raises(ConfigError, match="expected one judge"):
        load_config(WinRateConfig, [], settings, program="test")
