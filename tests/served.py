"""Servers of reward models in the process of a test, and servers that misbehave."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def serving() -> Iterator[Callable[..., Any]]:
    """``serving(folder, **options)``: a server in this process; ``server.url`` is where."""
    from reward.serving.server import RewardServer, ServeOptions  # not where no test asks for it

    running = []

    def start(folder: Path, **options):
        server = RewardServer(ServeOptions(folder=folder, **{"port": 0} | options))
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        if not server.stopping:
            server.shutdown()
            server.finish()


class Scripted(ThreadingHTTPServer):
    """Shows a card, and answers each POST by the next of its scripts; the last one stays."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, card: str, scripts: list) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.card, self.scripts, self.asked = card, scripts, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send(200, json.dumps({"data": [{"id": "reward"}, {"id": self.server.card}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            scripts = self.server.scripts
            script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        self.send(*script(body))

    def send(self, status: int, content: str, headers=()) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    """``scripted(card, *scripts)``: a server of lies; a script makes (status, content, headers) of a request."""
    running: list[Scripted] = []

    def start(card, *scripts) -> Scripted:
        server = Scripted(str(card), list(scripts))
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
