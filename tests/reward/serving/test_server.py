"""The server of ``rlhf serve reward``: scores, faults of requests, a full queue, keys, and its end."""

import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from reward.score import load_scorer, score_tokens
from reward.serving.batcher import Batcher, Full
from reward.serving.server import RewardServer, ServeOptions
from reward.serving.wire import NOT_FINITE
from rlhf.core.errors import ConfigError
from tests.ports import free_port

QUESTIONS = ("the sun", "the rain", "one day")
ANSWERS = ("is good", "is bad and so on and so on", "was a happy day")


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def scorer(final):
    model, chat = load_scorer(final)
    return chat, lambda rows: score_tokens(model, rows, batch_tokens=500)


def classified(answer):
    assert answer.status_code == 200, answer.text
    return [probability for each in answer.json()["data"] for probability in each["probs"]]


def test_every_form_of_request_gives_what_rlhf_score_gives(server, post, final, tmp_path, scorer):
    rows = [{"prompt": one, "response": other} for one, other in zip(QUESTIONS, ANSWERS, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(final), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "scores")]
    assert main(["score", *arguments]) == 0
    expected = [json.loads(line)["reward"] for line in (tmp_path / "scores").read_text().splitlines()]
    assert np.std(expected) > 0.01
    chat, _ = scorer
    talks = [talk(*each) for each in zip(QUESTIONS, ANSWERS, strict=True)]
    texts = [chat.render(each[:1], each[1:])[1] for each in talks]
    ids = [chat.encode(each[:1], each[1:])[0].tolist() for each in talks]
    found = {
        "messages": [classified(post(server, "/classify", {"messages": each}))[0] for each in talks],
        "texts": classified(post(server, "/classify", {"input": texts, "add_special_tokens": False})),
        "token ids": classified(post(server, "/classify", {"input": ids, "model": "reward"})),
        "one text": classified(post(server, "/classify", {"input": texts[0], "add_special_tokens": False})),
        "one list of ids": classified(post(server, "/classify", {"input": ids[0]})),
    }
    pairs = post(server, "/score", {"queries": list(QUESTIONS), "documents": list(ANSWERS)}).json()["data"]
    found["pairs"] = [each["score"] for each in pairs]
    for form, scores in found.items():
        assert scores == pytest.approx(expected[: len(scores)], abs=1e-5), form


def test_one_question_goes_with_every_answer(server, post, scorer):
    chat, score = scorer
    answer = post(server, "/score", {"text_1": "the sun", "text_2": list(ANSWERS)}).json()
    rows = [chat.encode(talk("the sun", text)[:1], talk("the sun", text)[1:])[0] for text in ANSWERS]
    assert [each["score"] for each in answer["data"]] == pytest.approx(score(rows), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, rows)) and answer["model"] == "reward"


def test_requests_at_one_time_share_passes_and_each_gets_its_own_scores(server, scorer, monkeypatch):
    _, score = scorer
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 300, size=generator.integers(1, 60)) for _ in range(150)]
    gate, passes = threading.Event(), []
    own = server.batcher._score

    def held(rows):
        assert gate.wait(20)
        passes.append(len(rows))
        return own(rows)

    monkeypatch.setattr(server.batcher, "_score", held)
    with ThreadPoolExecutor(30) as pool, httpx.Client(trust_env=False, timeout=30) as client:

        def ask(place):
            body = {"input": [row.tolist() for row in rows[5 * place : 5 * place + 5]]}
            return classified(client.post(server.url + "/classify", json=body))

        waiting = [pool.submit(ask, place) for place in range(30)]
        deadline = time.monotonic() + 20
        while server.batcher.waiting < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.set()
        found = [value for each in waiting for value in each.result()]
    assert found == pytest.approx(score(rows), abs=1e-5)
    assert sum(passes) == 150 and len(passes) < 10


def test_tokens_of_a_conversation_are_those_that_would_be_scored(server, post, scorer):
    chat, _ = scorer
    answer = post(server, "/tokenize", {"messages": talk("the sun", "is"), "add_generation_prompt": False}).json()
    expected = chat.encode(talk("the sun", "is")[:1], talk("the sun", "is")[1:])[0].tolist()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (expected, len(expected), 512)


BAD = {
    "no JSON": ("/classify", b"{", 400, "the body is no JSON"),
    "deep": ("/classify", b'{"input": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400, "nested too deeply"),
    "no object": ("/classify", [1], 400, "expected an object, found a list"),
    "nothing": ("/classify", {}, 400, "either input .* or messages"),
    "both": ("/classify", {"input": "a", "messages": []}, 400, "either input .* or messages"),
    "no text": ("/classify", {"input": []}, 400, "not empty"),
    "no token": ("/classify", {"input": [[]]}, 400, "input 0: has no token"),
    "mixed": ("/classify", {"input": ["a", 1]}, 400, "'a' is no token id"),
    "unknown id": ("/classify", {"input": [5, 10**6]}, 400, "1000000 is no token id of the model, which has 0 to"),
    "true is no id": ("/classify", {"input": [True]}, 400, "True is no token id"),
    "too long": ("/classify", {"input": [5] * 513}, 400, "513 tokens, and the model takes 512"),
    "unknown key": ("/classify", {"inptu": "a"}, 400, "inptu: unknown key; there are input"),
    "activation": ("/classify", {"input": "a", "use_activation": True}, 400, "use_activation = True: scores are given"),
    "cut": ("/classify", {"input": "a", "truncate_prompt_tokens": 5}, 400, "no text is cut"),
    "template": ("/classify", {"input": "a", "chat_template": "x"}, 400, "the one that the model was trained with"),
    "options of the template": (
        "/classify",
        {"messages": talk("a", "b"), "chat_template_kwargs": {"tools": [], "enable_thinking": True}},
        400,
        "chat_template_kwargs = .* the template is shown tools, and nothing else",
    ),
    "tools of a text": ("/classify", {"input": "a", "chat_template_kwargs": {"tools": [{}]}}, 400, "is shown tools"),
    "odd tools": (
        "/classify",
        {"messages": talk("a", "b"), "chat_template_kwargs": {"tools": [{}]}},
        400,
        "with a name",
    ),
    "other model": ("/classify", {"input": "a", "model": "gpt"}, 404, "model = 'gpt': is not served here"),
    "no messages": ("/classify", {"messages": []}, 400, "expected a list of messages"),
    "no role": ("/classify", {"messages": [{"content": "a"}]}, 400, r"messages\[0\]: expected an object with role"),
    "odd role": ("/classify", {"messages": [{"role": "x", "content": "a"}]}, 400, "role = 'x'"),
    "picture": ("/classify", {"messages": [{"role": "user", "content": [1]}]}, 400, "expected a text, found a list"),
    "open": ("/classify", {"messages": talk("a", "b")[:1]}, 400, "the last one must be the assistant's"),
    "half a pair": ("/score", {"queries": "a"}, 400, "give one of the pairs"),
    "crossed pair": ("/score", {"queries": "a", "text_2": "b"}, 400, "give one of the pairs"),
    "unequal": ("/score", {"queries": ["a", "b"], "documents": ["c"]}, 400, "queries has 2 texts and documents 1"),
    "no words": ("/score", {"queries": "a", "documents": [1]}, 400, "documents: expected a text"),
    "no tokens": ("/tokenize", {"messages": talk("a", "b")[:1]}, 400, "the last one must be the assistant's"),
    "of nothing": ("/tokenize", {}, 400, "expected a list of messages"),
    "nowhere": ("/clasify", {}, 404, "/clasify: there is /classify"),
    "wrong way": ("/health", {}, 405, "/health takes GET"),
}


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_told_what_is_wrong(server, post, path, body, status, message):
    answer = post(server, path, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert re.search(message, error["message"]) and error["code"] == status


def test_a_connection_goes_on_after_a_bad_request(server):
    with httpx.Client(trust_env=False, limits=httpx.Limits(max_connections=1)) as client:
        assert client.post(server.url + "/classify", json={"input": 3}).status_code == 400
        assert client.post(server.url + "/nowhere", json={"input": "a" * 1000}).status_code == 404
        assert client.post(server.url + "/classify", json={"input": [7]}).status_code == 200


def test_health_models_and_metrics_tell_what_is_served_and_what_was_done(serving, post, final):
    server = serving(final)
    classified(post(server, "/classify", {"input": [[5, 6], [7]]}))
    post(server, "/classify", {})
    assert httpx.get(server.url + "/health", trust_env=False).status_code == 200
    names = [each["id"] for each in httpx.get(server.url + "/v1/models", trust_env=False).json()["data"]]
    assert names == ["reward", str(server.card)]
    page = httpx.get(server.url + "/metrics", trust_env=False).text
    for line in (
        'margin_rlhf_requests_total{path="/classify",status="200"} 1',
        'margin_rlhf_requests_total{path="/classify",status="400"} 1',
        "margin_rlhf_texts_total 2",
        "margin_rlhf_tokens_total 3",
        "margin_rlhf_texts_waiting 0",
        f'weights="{server.card.weights}"',
    ):
        assert line in page


def test_a_full_queue_is_an_answer_of_its_own(serving, post, final):
    server = serving(final, queue=3)
    gate, own = threading.Event(), server.batcher._score
    server.batcher._score = lambda rows: gate.wait(20) and own(rows)
    assert post(server, "/classify", {"input": [[5]] * 4}).status_code == 413
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, "/classify", {"input": [[5]]})
        while server.batcher.waiting or not server._busy:
            time.sleep(0.01)
        time.sleep(0.05)
        second = pool.submit(post, server, "/classify", {"input": [[5], [6]]})
        while server.batcher.waiting < 2:
            time.sleep(0.01)
        full = post(server, "/classify", {"input": [[5], [6]]})
        gate.set()
        assert first.result().status_code == second.result().status_code == 200
    assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
    assert "2 texts wait, and 3 may" in full.json()["error"]["message"]


def test_a_queue_tells_how_long_it_will_take():
    gate = threading.Event()
    batcher = Batcher(lambda rows: gate.wait(20) and [0.0] * len(rows), capacity=10, pass_tokens=1)
    batcher.counts.rows, batcher.counts.seconds = 20, 10.0
    batcher.submit([np.arange(2)])
    while batcher.waiting:
        time.sleep(0.01)
    batcher.submit([np.arange(2)] * 9)
    with pytest.raises(Full) as full:
        batcher.submit([np.arange(2)] * 2)
    gate.set()
    batcher.close()
    assert full.value.seconds == 5


def test_a_fault_of_the_model_is_told_to_those_who_asked_and_the_server_goes_on(serving, post, final):
    server = serving(final)
    own = server.batcher._score

    def broken(rows):
        raise RuntimeError("no memory")

    server.batcher._score = broken
    answer = post(server, "/classify", {"input": [5]})
    assert answer.status_code == 500 and "RuntimeError: no memory" in answer.json()["error"]["message"]
    server.batcher._score = own
    assert post(server, "/classify", {"input": [5]}).status_code == 200


def test_a_score_that_is_not_finite_is_no_answer(serving, post, final, tmp_path):
    import shutil

    shutil.copytree(final, tmp_path / "broken")
    weights = load_file(final / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], float("nan"))
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    answer = post(serving(tmp_path / "broken"), "/classify", {"input": [5]})
    error = answer.json()["error"]
    assert answer.status_code == 500 and "is nan, which is not finite" in error["message"]
    assert error["type"] == NOT_FINITE


def test_with_a_key_nobody_else_is_answered(serving, post, final):
    server = serving(final, key="open-sesame")
    body = {"input": [5]}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic open-sesame"}):
        answer = post(server, "/classify", body, **headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert post(server, "/classify", body, Authorization="bearer open-sesame").status_code == 200
    assert httpx.get(server.url + "/v1/models", trust_env=False).status_code == 401
    assert httpx.get(server.url + "/health", trust_env=False).status_code == 200


def test_the_token_is_looked_at_before_the_body(serving, final):
    server = serving(final, key="open-sesame")
    head = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n"
    for told, expected in (("", b"HTTP/1.1 401 "), ("Authorization: Bearer open-sesame\r\n", b"HTTP/1.1 100 ")):
        for expect in ("Expect: 100-continue\r\n", "") if not told else ("Expect: 100-continue\r\n",):
            with socket.create_connection(server.server_address[:2], timeout=5) as line:
                line.sendall((head + told + expect + "\r\n").encode())  # and not yet a byte of the body
                assert line.recv(2000).startswith(expected)
                line.sendall(b'{"input": [[5]]}'[:15])


def test_an_address_that_is_taken_is_refused(server, final):
    with pytest.raises(ConfigError, match=r"choose another --host or --port"):
        RewardServer(ServeOptions(folder=final, port=server.server_address[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{final}/none"], "none: no such folder"),
        (["{final}", "--key-file", "{final}/none"], "--key-file .*none"),
        (["{final}", "--key-variable", "EMPTY_KEY"], "EMPTY_KEY: expected a key"),
        (
            ["{final}", "--engine", "vllm", "--vllm-python", "/nowhere/python"],
            "no such program.*vllm>=0.28.*--engine hf",
        ),
        (["{final}", "--host", "192.0.2.1"], "http://192.0.2.1:8000 cannot be served at"),
    ],
    ids=["folder", "key file", "key", "vllm", "host"],
)
def test_what_cannot_be_served_is_refused_in_a_line(final, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("EMPTY_KEY", " ")
    assert main(["serve", "reward", *(each.format(final=final) for each in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1


def test_a_request_that_has_begun_to_come_before_the_end_is_answered(final):
    server = RewardServer(ServeOptions(folder=final, port=free_port()))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    body = json.dumps({"input": [[5, 6, 7]]}).encode()
    with socket.create_connection(server.server_address[:2], timeout=20) as line:
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        line.sendall(head.encode() + body[:5])
        while not server._busy:
            time.sleep(0.01)
        server.shutdown()
        line.sendall(body[5:])
        answer = line.recv(20)
    assert answer.startswith(b"HTTP/1.1 200")
    server.finish()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.dist
def test_what_was_asked_before_the_end_is_answered(final, start_ranks):
    port = free_port()
    (process,) = start_ranks(["-m", "launch.cli", "serve", "reward", str(final), "--port", str(port)], ranks=1)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(url + "/health", trust_env=False).status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(0.1)
    with ThreadPoolExecutor(4) as pool:
        body = {"input": [[5] * 500] * 256}
        waiting = [pool.submit(httpx.post, url + "/classify", json=body, timeout=60, trust_env=False) for _ in range(4)]
        while "margin_rlhf_requests_in_flight 5" not in httpx.get(url + "/metrics", trust_env=False).text:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        answers = [each.result() for each in waiting]
    output, _ = process.communicate(timeout=60)
    assert [answer.status_code for answer in answers] == [200] * 4 and process.returncode == 0, output
    assert "stopped; 1024 texts were scored" in output and "in float32 as reward" in output
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health", trust_env=False)
