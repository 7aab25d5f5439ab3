"""The served page: for this machine alone, and another state as soon as something new is there."""

import http.client
import json
import threading

import pytest

from launch.report.serve import LOOPBACK, server_of, state_of
from rlhf.core.errors import UserError
from rlhf.train.status import new_status, write_status
from tests.launch.report.made_up import reward_run


@pytest.fixture
def served(tmp_path):
    folder = reward_run(tmp_path / "reward", steps=5, state="running")
    with server_of([folder], 0, interactive=False) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, server.server_address[1]
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=20)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_live_page_knows_its_state_and_a_new_step_is_another(served):
    folder, port = served
    code, page = get(port, "/")
    assert code == 200 and '<strong class="live">running</strong>' in page
    assert '<strong class="live">reward</strong> starting  step 5/5' in page
    before = get(port, "/state")[1]
    assert json.loads(page.partition('id="data">')[2].partition("</script>")[0])["state"] == before
    write_status(folder, new_status("reward", step=5, total=5))  # the run shows that it lives, no more
    assert state_of([folder]) != "" and get(port, "/nothing")[0] == 404
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "loss": 0.25}\n')
    assert get(port, "/state")[1] != before
    assert "0.25" in get(port, "/")[1]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example:8642"])
def test_a_page_of_another_site_gets_nothing(served, host):
    assert get(served[1], "/", host)[0] == 403


def test_a_run_that_vanishes_is_told(served):
    folder, port = served
    for path in folder.iterdir():
        path.unlink()
    code, text = get(port, "/")
    assert code == 503 and "no run" in text


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(served, port):
    with pytest.raises(UserError, match=rf"--port {port}: .*0-65535.*0 for a free one"):
        server_of([served[0]], port, interactive=False)


def test_a_port_that_is_taken_is_refused(served):
    folder, port = served
    with pytest.raises(UserError, match=rf"--port {port}: .*0 for a free one"):
        server_of([folder], port, interactive=False)
