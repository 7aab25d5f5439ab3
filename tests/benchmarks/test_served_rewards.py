"""Many clients of a reward server that is killed in between."""

import pytest

from benchmarks.served_rewards import Server, conversations, hammered
from reward.score import load_scorer, score_tokens
from tests.ports import free_port
from tests.published import published


@pytest.mark.slow
@pytest.mark.dist
def test_no_answer_is_wrong_and_no_request_lost_when_the_server_is_killed(tmp_path, tiny_model):
    final = published(tiny_model, tmp_path / "final")
    model, chat = load_scorer(final)
    talks = conversations(40)
    expected = score_tokens(model, [chat.encode(talk[:1], talk[1:])[0] for talk in talks], batch_tokens=8192)
    server = Server(final, free_port(), [])
    try:
        found = hammered(server, talks, expected, requests=1500, clients=8, share=0.01)
        assert server.stop() == 0
    except BaseException:
        server.kill()
        raise
    assert (found["answered"], found["wrong"], found["lost"], found["faults"]) == (1500, 0, 0, [])
    assert 600 <= found["answered before the kill"] < 1400 and found["tried again"] > 0
