"""``rlhf serve reward --engine vllm`` beside a program that only plays vLLM."""

import socket

import pytest

from reward.serving import vllm_server
from reward.serving.server import ServeOptions, address
from reward.serving.vllm_server import serve_by_vllm
from rlhf.core.errors import ConfigError, ModelError
from tests.ports import free_port


@pytest.fixture
def played(final, tmp_path, monkeypatch):
    """``played(script, **options)``: vLLM is what the script of a shell does."""
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.02)

    def start(script, healthy=False, **options):
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\n[ "$2" = "import vllm" ] && exit 0\n{script}\n')
        program.chmod(0o755)
        if healthy:
            monkeypatch.setattr(vllm_server, "_wait_until_healthy", lambda *_: True)
        asked = ServeOptions(folder=final, **{"port": free_port()} | options)
        return serve_by_vllm(asked, python=str(program), start_seconds=20)

    return start


@pytest.mark.parametrize("healthy", [False, True])
@pytest.mark.parametrize(("end", "status"), [("exit 3", "3"), ("kill -KILL $$", "-9"), ("exit 0", "0")])
def test_an_end_that_nobody_asked_for_is_told_with_its_last_words(played, healthy, end, status):
    with pytest.raises(ModelError, match=f"vLLM ended with status {status}; its last words:\nno memory is left"):
        played(f"echo no memory is left; {end}", healthy)


@pytest.mark.parametrize("healthy", [False, True])
@pytest.mark.parametrize("signal", ["TERM", "INT"])
def test_an_end_that_was_asked_for_is_a_clean_one(played, healthy, signal):
    assert played(f"kill -{signal} $PPID; exec sleep 20", healthy) == 0


def test_a_port_that_another_program_has_is_refused_before_the_start(played):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"http://127\.0\.0\.1:{port} cannot be served at: .* choose another"):
            played("exit 3", port=port)


def test_any_port_is_refused_for_nobody_would_know_it(played):
    with pytest.raises(ConfigError, match="--port 0: vLLM does not say which"):
        played("exit 3", port=0)


def test_addresses_of_hosts_with_colons_have_brackets():
    assert address("::1", 80) == "http://[::1]:80" and address("localhost", 80) == "http://localhost:80"
