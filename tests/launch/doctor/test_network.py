import http.server
import threading

import pytest

from launch.doctor import network
from launch.doctor.subject import Subject


def only(findings):
    (finding,) = findings
    return finding


# ---- hub


@pytest.fixture
def endpoint(monkeypatch):
    """A hub on this machine that refuses everything, as a proxy may; ``stop()`` ends it."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    def stop():
        if thread.is_alive():
            server.shutdown()
            thread.join()
            server.server_close()

    yield stop
    stop()


def test_a_hub_that_answers_anything_is_reached(endpoint):
    finding = only(network.hub(Subject()))
    assert finding.status == "ok" and finding.text.endswith(" answers")


def test_a_hub_that_does_not_answer_is_a_warning_and_a_failure_where_a_model_comes_from_it(endpoint, stage):
    endpoint()
    finding = only(network.hub(Subject(stages=(stage(),))))
    assert finding.status == "warning" and "Connection refused" in finding.text and "HF_HUB_OFFLINE=1" in finding.remedy
    finding = only(network.hub(Subject(stages=(stage("model.path=some/model"),))))
    assert finding.status == "failure" and "some/model are not folders here" in finding.text


def test_without_a_hub_only_names_are_a_warning(monkeypatch, stage):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert only(network.hub(Subject(stages=(stage(),)))).status == "ok"
    finding = only(network.hub(Subject(stages=(stage("model.path=some/model"),))))
    assert finding.status == "warning" and "hf download NAME" in finding.remedy


# ---- SLURM


def test_no_slurm_is_no_fault(no_programs):
    assert only(network.slurm(Subject())).status == "ok"


def test_a_slurm_that_answers_is_shown_with_its_nodes(program, monkeypatch):
    program("sinfo", "echo 'gpu* 14 idle'; echo 'gpu* 2 down*'")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    finding = only(network.slurm(Subject()))
    assert finding.text == "answers, inside job 77; nodes by partition and state: gpu*: 14 idle; gpu*: 2 down*"


def test_a_controller_that_refuses_is_a_warning_with_what_it_said(program):
    program("sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    finding = only(network.slurm(Subject()))
    assert finding.status == "warning" and "Unable to contact slurm controller" in finding.text
    assert "munge" in finding.remedy


def test_a_controller_that_hangs_is_a_warning(program, monkeypatch):
    monkeypatch.setattr(network, "SECONDS", 0.2)
    program("sinfo", "exec sleep 30")
    assert "sinfo gives no answer within 0.4 s" in only(network.slurm(Subject())).text


# ---- hostfile


@pytest.fixture
def hosts(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("node1 slots=2\nnode2 slots=4\n")
    return path


def test_no_hostfile_is_not_spoken_of():
    assert [*network.hostfile(Subject())] == []


def test_a_missing_hostfile_is_a_failure_with_what_to_write(tmp_path):
    finding = only(network.hostfile(Subject(hostfile=tmp_path / "none")))
    assert finding.status == "failure" and "no such file" in finding.text
    assert "'HOST slots=DEVICES'" in finding.remedy


def test_a_node_that_does_not_answer_is_a_failure_by_name(hosts, program):
    program("ssh", 'case "$*" in *node2*) echo "ssh: connect to host node2: No route to host" >&2; exit 255;; esac')
    finding = only(network.hostfile(Subject(hostfile=hosts)))
    assert finding.status == "failure"
    assert finding.text == "node2 cannot be reached over ssh: ssh: connect to host node2: No route to host"
    assert "ssh-copy-id node2" in finding.remedy


def test_nodes_that_answer_are_counted(hosts, program):
    program("ssh", "true")
    assert only(network.hostfile(Subject(hostfile=hosts))).text.startswith("2 node(s) with 6 slot(s) in all")


def test_a_machine_without_ssh_cannot_start_nodes(hosts, no_programs):
    finding = only(network.hostfile(Subject(hostfile=hosts)))
    assert finding.status == "failure" and "openssh-client" in finding.remedy


def test_a_machine_without_pdsh_can(hosts, no_programs):
    (no_programs / "ssh").write_text("#!/bin/sh\n")
    (no_programs / "ssh").chmod(0o755)
    assert only(network.hostfile(Subject(hostfile=hosts))).status == "ok"
