"""Clients of reward servers: several servers, servers that die, hang, lie, or serve another model."""

import json
import logging
import shutil
import threading
import time

import numpy as np
import pytest

from reward.function import Answers, load_reward, served_cards
from reward.score import load_scorer, score_tokens
from reward.serving import client
from reward.serving.card import card_of, read_card
from reward.serving.check import CALLING
from reward.serving.client import RewardServers
from reward.serving.wire import NOT_FINITE, fault
from rlhf.core.errors import ConfigError, DataError, ModelError
from rlhf.data.options import TemplateChoice
from rlhf.models.manifest import MANIFEST_NAME
from rlhf.train.chat import load_chat
from tests.published import WITH_TOOLS, published


@pytest.fixture(scope="module")
def card(final):
    return card_of(final)


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    return [generator.integers(3, 300, size=generator.integers(1, 60)) for _ in range(200)]


@pytest.fixture(scope="module")
def expected(final, rows):
    return score_tokens(load_scorer(final)[0], rows, batch_tokens=500)


def asked(*servers, **options):
    return RewardServers([server.url for server in servers], **{"first_wait": 0.02, "setting": "reward.url"} | options)


def truth(body):
    """Scores that tell a text by its first token."""
    data = [{"index": place, "probs": [float(row[0])]} for place, row in enumerate(body["input"])]
    return 200, json.dumps({"data": data})


def busy(body):
    return 503, json.dumps({"error": {"message": "full"}}), (("Retry-After", "0.3"),)


def test_scores_come_in_the_order_of_the_rows(server, rows, expected):
    assert asked(server).score_tokens(rows) == pytest.approx(expected, abs=1e-5)


def test_conversations_are_scored_in_the_template_of_the_model(server, final):
    model, chat = load_scorer(final)
    talks = [
        [{"role": "user", "content": "the sun"}, {"role": "assistant", "content": text}] for text in ("is", "is good")
    ]
    expected = score_tokens(model, [chat.encode(each[:1], each[1:])[0] for each in talks], batch_tokens=500)
    assert asked(server).score_conversations(talks) == pytest.approx(expected, abs=1e-5)


def test_a_server_is_a_reward_of_evaluations(serving, final):
    both = serving(final), serving(final)
    answers = Answers(
        prompts=["the sun", [{"role": "user", "content": "the rain"}]],
        responses=["is good", "is bad and so on"],
        token_ids=None,
        ended=[True, True],
        columns=[{}, {}],
    )
    here, there = (load_reward(spec) for spec in (str(final), ",".join(server.url for server in both)))
    judges = [judge.reading(answers.prompts, answers.columns) for judge in (here, there)]
    assert judges[1](answers) == pytest.approx(judges[0](answers), abs=1e-5)
    assert served_cards(proxy=there, gold=here) == {"served": {"proxy": str(card_of(final))}}
    assert served_cards(gold=here) == {}
    with pytest.raises(ConfigError, match="expected the address of a server"):
        load_reward(f"{both[0].url},localhost")


def test_a_prompt_that_the_served_template_cannot_show_is_named_before_anything_is_sampled(serving, final, tmp_path):
    folder = tmp_path / "final"
    shutil.copytree(final, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ raise_exception('no rain') if 'rain' in messages[0]['content'] }}" + template.read_text())
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"template_digest": load_chat(folder).digest}))
    server = serving(folder)
    judge = load_reward(server.url)
    with pytest.raises(DataError, match=rf"{server.url}: prompt 2: the chat template cannot show .*no rain"):
        judge.reading(["the sun", "the rain", "more rain"], [{}] * 3)
    assert not server.batcher.counts.rows
    servers = asked(server)
    assert [*servers.refusals([[{"role": "user", "content": text}] for text in ("rain", "sun", "rain")])] == [0, 2]


def test_tools_and_calls_are_scored_as_the_template_of_the_model_shows_them(serving, tiny_model, tmp_path):
    folder = published(tiny_model, tmp_path / "final", TemplateChoice(text=WITH_TOOLS))
    model, chat = load_scorer(folder)
    expected = score_tokens(model, [chat.encode(each[:-1], each[-1:])[0] for each in CALLING], batch_tokens=500)
    without = [[{**message, "tools": []} for message in each] for each in CALLING]
    servers = asked(serving(folder))
    assert servers.score_conversations(CALLING) == pytest.approx(expected, abs=1e-5)
    assert np.abs(np.subtract(servers.score_conversations(without), expected)).min() > 1e-3
    assert servers.refusals([each[:-1] for each in CALLING]) == {}


def test_a_server_that_drops_tools_without_a_word_is_found(scripted, card):
    """As vLLM does with a template that does not show them."""
    server = scripted(card, lambda body: (200, json.dumps({"tokens": [len(str(body["messages"]))]})))
    found = asked(server).refusals([CALLING[0][:-1], [{"role": "user", "content": "no tools"}]])
    assert found == {0: "the template does not show the tools of the conversation (clock)"}


def test_several_servers_share_the_work(serving, final, rows, expected):
    both = serving(final), serving(final)
    assert asked(*both, concurrency=4).score_tokens(rows) == pytest.approx(expected, abs=1e-5)
    counts = [server.batcher.counts.rows for server in both]
    assert sum(counts) == len(rows) and min(counts) > 20


def test_a_server_that_goes_away_costs_no_score(serving, final, rows, expected, caplog):
    stays, goes = serving(final), serving(final)
    servers = asked(stays, goes, concurrency=4)
    own = goes.batcher._score
    goes.batcher._score = lambda rows: time.sleep(0.05) or own(rows)

    def end():
        while goes.batcher.counts.rows < 16:
            time.sleep(0.01)
        goes.shutdown()
        goes.finish()

    ending = threading.Thread(target=end)
    ending.start()
    with caplog.at_level(logging.WARNING):
        found = [servers.score_tokens(rows) for _ in range(3)]
    ending.join()
    for scores in found:
        assert scores == pytest.approx(expected, abs=1e-5)
    assert servers.retried > 0
    assert any(goes.url in record.getMessage() and "asked again" in record.getMessage() for record in caplog.records)


def test_a_server_that_is_busy_is_asked_again_when_it_says(scripted, card):
    server = scripted(card, busy, truth)
    began = time.monotonic()
    assert asked(server).score_tokens([np.array([7, 8])]) == [7.0]
    assert 0.3 <= time.monotonic() - began < 5 and len(server.asked) == 2


@pytest.mark.parametrize("said", ["0", "0.01", "-5", "nan", "inf", "soon"])
def test_a_server_that_is_full_for_long_is_waited_for_ever_longer(scripted, card, said):
    full = (lambda body: (503, "{}", (("Retry-After", said),)),) * 9
    server = scripted(card, *full, truth)
    began = time.monotonic()
    assert asked(server, first_wait=0.002).score_tokens([np.array([7, 8])]) == [7.0]
    assert time.monotonic() - began >= 0.002 * (2**9 - 1) and len(server.asked) == 10


def test_a_server_that_stays_full_is_given_up_once_the_patience_is_over(scripted, card):
    server = scripted(card, lambda body: (503, '{"error": {"message": "full"}}', (("Retry-After", "0"),)))
    began = time.monotonic()
    with pytest.raises(ModelError, match=rf"reward\.url: {server.url}: status 503: full \(asked \d times in 1 s\)"):
        asked(server, patience_seconds=1.0).score_tokens([np.array([7])])
    assert 1 <= time.monotonic() - began < 3 and len(server.asked) >= 5


def test_a_path_that_a_proxy_loses_for_a_moment_is_no_other_model(scripted, card):
    lost = [lambda body: (404, "<html>")] * 2
    assert asked(scripted(card, *lost, truth)).score_tokens([np.array([7])]) == [7.0]
    server = scripted(card, *lost)
    with pytest.raises(ModelError, match=r"status 404: <html> \(asked 3 times"):
        asked(server).score_tokens([np.array([7])])


LIES = {
    "not finite": (lambda body: (200, '{"data": [{"index": 0, "probs": [NaN]}]}'), "score of a text is nan.*broken"),
    "infinite": (lambda body: (200, '{"data": [{"index": 0, "probs": [-Infinity]}]}'), "score of a text is -inf"),
    "too few": (lambda body: (200, '{"data": []}'), "gave 0 scores for 1 text"),
    "two classes": (lambda body: (200, '{"data": [{"index": 0, "probs": [0.1, 0.9]}]}'), "none of a reward model"),
    "another place": (lambda body: (200, '{"data": [{"index": 1, "probs": [0.1]}]}'), "gave 1 scores for 1 text"),
    "no JSON": (lambda body: (200, "<html>"), "none of a reward model: '<html>'"),
    "a refusal": (lambda body: (400, '{"error": {"message": "too long"}}'), "status 400: too long"),
    "no right": (lambda body: (401, "{}"), "status 401: set MARGIN_RLHF_REWARD_KEY"),
    "broken weights": (
        lambda body: (500, json.dumps(fault("the score of text 0 is nan", 500, NOT_FINITE))),
        "[0-9]: the score of text 0 is nan$",
    ),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES.keys())
def test_an_answer_that_cannot_be_believed_is_refused_at_once(scripted, card, lie, message):
    server = scripted(card, lie)
    with pytest.raises(ModelError, match=message) as refusal:
        asked(server).score_tokens([np.array([7, 8])])
    assert server.url in str(refusal.value) and len(server.asked) == 1 and "\n" not in str(refusal.value)


def test_a_server_that_hangs_is_named(scripted, card):
    gate = threading.Event()
    server = scripted(card, lambda body: gate.wait(20) and truth(body))
    servers = asked(server, timeout_seconds=0.2)
    with pytest.raises(
        ModelError, match=rf"reward\.url: {server.url}: no answer within 0\.2 s \(asked 3 times in 1 s\)"
    ):
        servers.score_tokens([np.array([7, 8])])
    gate.set()


def test_beside_a_server_that_hangs_the_others_answer(scripted, card):
    gate = threading.Event()
    hangs, stays = scripted(card, lambda body: gate.wait(20) and truth(body)), scripted(card, truth)
    rows = [np.array([place, 1]) for place in range(1, 60)]
    found = asked(hangs, stays, timeout_seconds=0.3, first_wait=30.0).score_tokens(rows)
    gate.set()
    assert found == [float(row[0]) for row in rows] and hangs.asked


def test_a_server_that_always_fails_is_given_up(scripted, card):
    server = scripted(card, lambda body: (500, '{"error": {"message": "Out of range float values"}}'))
    with pytest.raises(ModelError, match=r"status 500: Out of range float values \(asked 3 times in 0 s\)"):
        asked(server).score_tokens([np.array([7])])


def test_a_server_that_is_not_there_is_named(server):
    gone = RewardServers(["http://127.0.0.1:9"], patience_seconds=0.5, first_wait=0.01, setting="reward.url")
    with pytest.raises(ModelError, match=r"reward\.url: http://127\.0\.0\.1:9: ConnectError.*asked \d+ times in \d s"):
        gone.score_tokens([np.array([7])])


def test_every_request_names_the_model_by_its_card(scripted, card):
    server = scripted(card, truth)
    asked(server).score_tokens([np.array([7])])
    assert [each["model"] for each in server.asked] == [str(card)]


def test_a_server_that_comes_back_with_another_model_is_refused(serving, final, moved):
    first = serving(final)
    servers = asked(first)
    assert servers.score_tokens([np.array([7])])
    port = first.server_address[1]
    first.shutdown()
    first.finish()
    serving(moved, port=port)
    with pytest.raises(ModelError, match=r"does not serve .* any more: it was started anew with another model"):
        servers.score_tokens([np.array([7])])


def test_servers_of_different_models_are_refused(server, serving, moved):
    other = serving(moved)
    with pytest.raises(ModelError, match=rf"{server.url} and {other.url} serve different models: weights \("):
        _ = asked(server, other).card


def test_a_server_that_does_not_say_what_it_serves_is_refused(scripted):
    server = scripted("some-model", truth)
    with pytest.raises(ModelError, match="serves reward, some-model, and does not say which reward model that is"):
        _ = asked(server).card


@pytest.mark.parametrize("text", ["margin-rlhf/2:weights=a", "margin-rlhf/1:weights=a", "margin-rlhf/1:a;b"])
def test_a_card_of_another_form_is_refused(text):
    with pytest.raises(ModelError, match="no card of a reward model that this version reads"):
        read_card(text)


def test_a_card_says_the_same_once_it_is_read(card):
    assert read_card(str(card)) == card and read_card("reward") is None and card.deviation == 0.4


def test_a_key_is_taken_from_the_environment(serving, final, monkeypatch):
    server = serving(final, key="open-sesame")
    with pytest.raises(ModelError, match="set MARGIN_RLHF_REWARD_KEY"):
        _ = asked(server).card
    monkeypatch.setenv(client.KEY_VARIABLE, "open-sesame")
    assert len(asked(server).score_tokens([np.array([7])])) == 1


@pytest.mark.parametrize("key", ["se\ncret", "sécret", "se cret"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(server, monkeypatch, key):
    monkeypatch.setenv(client.KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match="MARGIN_RLHF_REWARD_KEY: expected a key of letters") as refusal:
        _ = asked(server).card
    assert "cret" not in str(refusal.value)


@pytest.mark.parametrize("url", ["localhost:8000", "http:/x", "ftp://host", "http://host?x=1", "http://a:b@host"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="expected the address of a server"):
        RewardServers([url])
