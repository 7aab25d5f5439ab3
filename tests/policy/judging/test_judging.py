"""Two files of answers and a judge: a function, a reward model, an endpoint that behaves badly."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from launch.cli import main
from policy.judging.endpoint import Endpoint, Judge, Refused
from policy.judging.run import by_endpoint, by_reward, compare, cost, question, read_pairs, verdict, win_rate_table
from rlhf.core.errors import DataError

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


class Stub:
    """An endpoint that says which answer is the good one, after the ``moods`` of its first replies."""

    def __init__(self, moods=()):
        self.moods, self.asked, self.keys = list(moods), Counter(), set()
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                text = body["messages"][-1]["content"]
                with stub._lock:
                    stub.asked[text] += 1
                    stub.keys.add(self.headers.get("authorization"))
                    mood = stub.moods.pop(0) if stub.moods else "well"
                if mood == "slow":
                    time.sleep(1.0)
                refusals = {"429": ("", 429), "500": ("", 500), "401": ("who are you?", 401)}
                reply, status = refusals.get(mood, (None, 200))
                if reply is None:
                    first = text.partition("# Answer A\n\n")[2].partition("\n")[0]
                    said = {"garbage": "as an AI, I", "both": "A or B"}.get(mood, "A" if first == "good" else "B.")
                    reply = json.dumps({"choices": [{"message": {"content": said}}]}) if mood != "html" else "<html>"
                try:
                    self.send_response(status)
                    if mood == "429":
                        self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(reply.encode())
                except OSError:  # nobody waits any more
                    pass

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub():
    made = []

    def start(*moods):
        made.append(Stub(moods))
        return made[-1]

    yield start
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def endpoint(stub, **changes):
    given = {"url": stub.url, "model": "m", "first_wait": 0.01, "timeout_seconds": 0.4, "concurrency": 3}
    return Endpoint(**{**given, **changes})


def judged_by(stub, files, folder, **changes):
    prefer = by_endpoint(endpoint(stub, **changes), folder / "judge.jsonl", Console(quiet=True))
    return compare(files[0], files[1], prefer, folder)


def test_each_pair_is_judged_in_both_orders(stub, files, tmp_path):
    server = stub()
    found, result = judged_by(server, files, tmp_path / "out")
    assert (found.name, found.reference, result.value, result.ties) == ("new", "old", 0.5, 0)
    rows = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [1, 0, 1, 0, 1, 0]
    assert len(server.asked) == 12
    assert json.loads((tmp_path / "out" / "win_rate.json").read_text())["value"] == 0.5


def test_a_judge_who_likes_the_first_place_decides_nothing(files, tmp_path):
    pairs = read_pairs(*files[:2]).pairs

    class FirstPlace(Judge):
        def ask(self, questions, read, advance=None):
            return [1.0] * len(questions)

    from policy.judging import run

    original = run.Judge
    try:
        run.Judge = FirstPlace
        prefer = by_endpoint(Endpoint(url="u", model="m"), tmp_path / "judge.jsonl", Console(quiet=True))
        assert list(prefer(pairs)) == [0.5] * 6
    finally:
        run.Judge = original


def test_an_endpoint_in_every_bad_mood_is_asked_again(stub, files, tmp_path):
    server = stub("429", "500", "garbage", "slow", "both", "html")
    _, result = judged_by(server, files, tmp_path / "out", key="secret")
    assert result.value == 0.5
    assert sum(server.asked.values()) == 12 + 6
    assert server.keys == {"Bearer secret"}
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_what_was_answered_is_kept_and_never_asked_twice(stub, files, tmp_path):
    server = stub(*["well"] * 5, *["500"] * 100)
    with pytest.raises(DataError, match=r"7 of 12 questions have no answer .* after 2 tries each \(status 500\)"):
        judged_by(server, files, tmp_path / "out", tries=2, concurrency=1)
    cache = tmp_path / "out" / "judge.jsonl"
    assert len(cache.read_text().splitlines()) == 5
    with cache.open("a") as handle:
        handle.write('{"key": "cut')
    server.moods.clear()
    answered = {text for text, count in server.asked.items() if count == 1}
    _, result = judged_by(server, files, tmp_path / "out")
    assert result.value == 0.5 and all(server.asked[text] == 1 for text in answered)
    before = sum(server.asked.values())
    judged_by(server, files, tmp_path / "out")
    assert sum(server.asked.values()) == before


def test_a_refusal_ends_it_at_once_and_says_why(stub, files, tmp_path):
    server = stub(*["401"] * 100)
    with pytest.raises(Refused, match="status 401: who are you"):
        judged_by(server, files, tmp_path / "out", concurrency=1)
    assert sum(server.asked.values()) < 12


def test_an_address_where_nobody_is_ends_in_one_message(files, tmp_path):
    nobody = Endpoint(url="http://127.0.0.1:9/v1", model="m", tries=2, first_wait=0.01)
    with pytest.raises(DataError, match=r"12 of 12 questions have no answer .*ConnectError"):
        compare(*files[:2], by_endpoint(nobody, tmp_path / "judge.jsonl", Console(quiet=True)), tmp_path)


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        ("A", 1.0),
        ("b", 0.0),
        ("**Tie**", 0.5),
        ("Verdict: A.", 1.0),
        ("It is a tie.", 0.5),
        ("B is a better answer", 0.0),
        ("", None),
        ("A B", None),
        ("a better one", None),
    ],
)
def test_a_verdict_is_one_word(reply, worth):
    if worth is None:
        with pytest.raises(ValueError, match="without one verdict"):
            verdict(reply)
    else:
        assert verdict(reply) == worth


def test_a_single_question_has_no_standard_error(files, tmp_path):
    _, _, write = files
    own, other = (write(name, [name], ["why?"]) for name in ("longer", "short"))
    found, result = compare(own, other, lambda pairs: [1.0], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "win_rate.json").read_text())["standard_error"] is None
    assert win_rate_table(found, result).row_count == 2


def test_a_line_that_cannot_be_read_is_named(files, tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "resp')
    with pytest.raises(DataError, match=r"responses\.jsonl:2: unreadable row: not JSON"):
        read_pairs(path, files[1])


def test_the_cost_is_told_before(files):
    pairs = read_pairs(*files[:2]).pairs
    asked = [question(pair, swapped=False) for pair in pairs]
    read = sum(len(message["content"]) for each in asked for message in each) // 4
    assert cost(asked, 16, (10.0, 30.0), known=2) == (
        f"6 questions to the judge (2 are answered already): about {read:,} tokens to read, at most 96 to write: "
        f"about {(read * 10 + 96 * 30) / 1e6:.2f} at these prices"
    )


def test_a_function_judges(files, tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(
        "def good(prompts, responses): return [float(text == 'good') for text in responses]\n"
        "def nothing(prompts, responses): return [None] * len(responses)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert list(by_reward("judges:good")(read_pairs(*files[:2]).pairs)) == [1, 0, 1, 0, 1, 0]
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
    server = stub()
    monkeypatch.setenv("MY_KEY", "k")
    address = ["--judge-url", server.url, "--key-variable", "MY_KEY"]
    assert main([*given, *address, "--judge-model", "m", "--prices", "1", "2"]) == 0
    printed = capsys.readouterr().out
    assert "12 questions to the judge" in printed and "new against old, 6 questions" in printed and "50.0%" in printed
    assert server.keys == {"Bearer k"}
    assert main([*given, *address]) == 2
    assert "--judge-url needs --judge-model" in capsys.readouterr().err
