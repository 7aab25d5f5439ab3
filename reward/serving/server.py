"""``rlhf serve reward``: a published reward model behind HTTP."""

import hmac
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from reward.saving import load_reward_model
from reward.score import check_scorer, score_tokens
from reward.serving import wire
from reward.serving.batcher import Batcher, Full
from reward.serving.card import card_of
from rlhf.core.errors import ConfigError
from rlhf.core.servers import checked_key
from rlhf.engine.build import DTYPES, has_bfloat16
from rlhf.engine.ranks import single_rank
from rlhf.models.backbones import embedding_rows, hide_loading_bars
from rlhf.models.options import BackboneConfig
from rlhf.models.positions import places_of, settings_of

LARGEST_BODY = 64 * 2**20
IDLE_SECONDS = 75
"""A connection on which nothing comes for so long is closed."""
REFUSED_SECONDS = 5
"""The same while a request is passed over that has not the right token."""
PASSES = 4
"""Batches that are taken out of the queue at once: rows of like length find each other among them."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to serve, where and how."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "reward"
    """The name of the model in answers; requests may name it or the card."""
    dtype: str = "auto"
    """Type of the weights; auto: bfloat16 on a GPU that has it, else float32."""
    batch_tokens: int = 8192
    """Padded tokens at once."""
    queue: int = 4096
    """Texts that may wait; a request beyond it is answered with 503."""
    key: str | None = None
    """The bearer token that requests must bring."""

    @property
    def weights(self) -> str:
        return ("bfloat16" if has_bfloat16() else "float32") if self.dtype == "auto" else self.dtype


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT; what was asked by then is answered.

    Raises:
        ModelError: if the folder holds no reward model.
        ConfigError: if the address cannot be had.
    """
    hide_loading_bars()
    server = RewardServer(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
    host, port = server.server_address[:2]
    print(f"{options.folder}: served at {address(str(host), port)} in {options.weights} as {options.name}", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.finish()
    print(f"stopped; {server.batcher.counts.rows} texts were scored", flush=True)


class RewardServer(ThreadingHTTPServer):
    """A thread for each connection, and one for the model."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, options: ServeOptions) -> None:
        """Take the address, load the model, then listen.

        Raises:
            ModelError: if the folder holds no reward model.
            ConfigError: if the address cannot be had.
        """
        chat = check_scorer(options.folder)
        self.card = card_of(options.folder)
        if ":" in options.host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((options.host, options.port), _Handler, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as error:
            raise _not_free(options.host, options.port, error) from error
        try:
            self._open(options, chat)
        except BaseException:
            self.server_close()
            raise
        self.server_activate()

    def _open(self, options: ServeOptions, chat: Any) -> None:
        device = single_rank().device
        model = load_reward_model(options.folder, dtype=DTYPES[options.weights]).eval().to(device)
        self.options, self.since = options, int(time.time())
        self.names = (options.name, str(self.card))
        self.limit = places_of(settings_of(BackboneConfig(path=str(options.folder))))
        self.reader = wire.Reader(chat=chat, names=self.names, vocabulary=embedding_rows(model.hf), limit=self.limit)
        self.batcher = Batcher(
            lambda rows: score_tokens(model, rows, batch_tokens=options.batch_tokens),
            capacity=options.queue,
            pass_tokens=PASSES * options.batch_tokens,
        )
        self.stopping = False
        self.answers: Counter[tuple[str, int]] = Counter()
        self.seconds: dict[str, float] = {}
        self._busy = 0
        self.reading = threading.Lock()  # tokenizers are not made for several threads
        self._changed = threading.Condition()

    def shutdown(self) -> None:
        self.stopping = True
        super().shutdown()

    def finish(self) -> None:
        """Answer what was asked, take no more."""
        self.stopping = True
        self.server_close()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, timeout=IDLE_SECONDS)
        self.batcher.close()

    def begun(self) -> bool:
        """A request has come; whether it is taken, which one that comes behind the end is not."""
        with self._changed:
            self._busy += 1
            return not self.stopping

    def ended(self, path: str, status: int, seconds: float) -> None:
        with self._changed:
            self._busy -= 1
            self.answers[path, status] += 1
            self.seconds[path] = self.seconds.get(path, 0.0) + seconds
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over connections that break; anything else is a fault of this program."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def metrics(self) -> str:
        """The page of Prometheus."""
        counts = self.batcher.counts
        with self._changed:
            answers, seconds, busy = dict(self.answers), dict(self.seconds), self._busy
        card = ",".join(f'{name}="{value}"' for name, value in vars(self.card).items())
        pages = [
            _metric("info", "gauge", "The card of the model.", {f"{{{card}}}": 1}),
            _metric(
                "requests_total",
                "counter",
                "Answers by path and status.",
                {f'{{path="{path}",status="{status}"}}': count for (path, status), count in sorted(answers.items())},
            ),
            _metric(
                "request_seconds_total",
                "counter",
                "Time from request to answer, added up.",
                {f'{{path="{path}"}}': value for path, value in sorted(seconds.items())},
            ),
            _metric("requests_in_flight", "gauge", "Requests that have no answer yet.", {"": busy}),
            _metric("texts_waiting", "gauge", "Texts in the queue.", {"": self.batcher.waiting}),
            _metric("queue_capacity", "gauge", "Texts that may wait.", {"": self.batcher.capacity}),
            _metric("texts_total", "counter", "Texts that were scored.", {"": counts.rows}),
            _metric("tokens_total", "counter", "Tokens of these.", {"": counts.tokens}),
            _metric("passes_total", "counter", "Times that the queue was emptied into the model.", {"": counts.passes}),
            _metric("scoring_seconds_total", "counter", "Time spent in the model.", {"": counts.seconds}),
        ]
        return "".join(pages)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = "margin-rlhf"
    sys_version = ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        pages = {"/health": self._health, "/v1/models": self._models, "/metrics": self._metrics}
        self._serve(pages, ("/classify", "/score", "/tokenize"), "POST")

    def do_POST(self) -> None:
        pages = {
            "/classify": self._classify,
            "/score": self._score,
            "/v1/score": self._score,
            "/tokenize": self._tokenize,
        }
        self._serve(pages, ("/health", "/v1/models", "/metrics"), "GET")

    def _serve(self, pages: Mapping[str, Any], others: tuple[str, ...], method: str) -> None:
        path = self.path.partition("?")[0]
        began = time.perf_counter()
        taken, status = self.server.begun(), 500
        try:
            status = self._respond(pages, path, others, method, taken=taken)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            status = 499  # nobody waits for the answer any more
        finally:
            self.server.ended(path if path in pages else "other", status, time.perf_counter() - began)

    def _respond(
        self, pages: Mapping[str, Any], path: str, others: tuple[str, ...], method: str, *, taken: bool
    ) -> int:
        headers: dict[str, str] = {}
        try:
            if path != "/health" and not self._may_ask():  # before anything of the body is kept
                self.close_connection = True
                headers["WWW-Authenticate"] = "Bearer"
                raise wire.Refusal("a bearer token is needed, and this request has not the right one", 401)
            body = self._body()  # always: what is left unread would be taken for the next request
            if not taken:
                headers["Retry-After"] = "1"
                raise wire.Refusal("stopping", 503)
            if path in others:
                raise wire.Refusal(f"{path} takes {method}", 405)
            if path not in pages:
                raise wire.Refusal(f"{path}: there is {', '.join((*pages, *others))}", 404)
            status, content = 200, pages[path](body)
        except wire.Refusal as bad:
            status, content = bad.status, wire.fault(str(bad), bad.status, bad.kind)
        except Full as full:
            headers["Retry-After"] = str(full.seconds)
            status, content = 503, wire.fault(str(full), 503)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # of the model: whoever asked is told, the server goes on
            status, content = 500, wire.fault(f"{type(error).__name__}: {str(error)[:500]}", 500)
        self._answer(status, content, headers)
        if status == 401:
            self._pass_over_body()
        return status

    def _answer(self, status: int, content: Any, headers: Mapping[str, str]) -> None:
        is_text = isinstance(content, str)
        raw = (content if is_text else json.dumps(content, allow_nan=False)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8" if is_text else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.stopping or self.close_connection:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()

    def _may_ask(self) -> bool:
        key = self.server.options.key
        if key is None:
            return True
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())

    def _body(self) -> bytes:
        """Content of the request, read whole.

        Raises:
            Refusal: if its length is not told, or too much.
        """
        if self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise wire.Refusal("Transfer-Encoding is not understood; send Content-Length", 411)
        told = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if not told.isdecimal():
            self.close_connection = True
            raise wire.Refusal("Content-Length is missing", 411)
        if int(told) > LARGEST_BODY:
            self.close_connection = True
            raise wire.Refusal(f"{told} bytes, and {LARGEST_BODY} may come at once; send fewer texts", 413)
        body = self.rfile.read(int(told))
        if len(body) < int(told):
            raise ConnectionResetError
        return body

    def _pass_over_body(self) -> None:
        """Read what still comes and keep nothing: a connection that is closed on it may lose the answer."""
        told = self.headers.get("Content-Length", "")
        left = min(int(told), LARGEST_BODY) if told.isdecimal() else 0
        self.connection.settimeout(REFUSED_SECONDS)
        while left > 0 and (piece := self.rfile.read1(left)):
            left -= len(piece)

    def handle_expect_100(self) -> bool:
        """Ask for the body, at once; whoever may not send one gets the answer in its place."""
        if self.path.partition("?")[0] == "/health" or self._may_ask():
            super().handle_expect_100()
            self.wfile.flush()
        return True

    def _health(self, body: bytes) -> str:
        return ""

    def _models(self, body: bytes) -> dict[str, Any]:
        server = self.server
        return wire.models(server.names, str(server.options.folder), server.limit, server.since)

    def _metrics(self, body: bytes) -> str:
        return self.server.metrics()

    def _classify(self, body: bytes) -> dict[str, Any]:
        return self._scores(self.server.reader.classify, wire.classification, body)

    def _score(self, body: bytes) -> dict[str, Any]:
        return self._scores(self.server.reader.score, wire.scored, body)

    def _tokenize(self, body: bytes) -> dict[str, Any]:
        request = _json(body)
        with self.server.reading:
            row = self.server.reader.tokenize(request)
        return wire.tokenized(row, self.server.limit)

    def _scores(self, read: Any, shown: Any, body: bytes) -> dict[str, Any]:
        request = _json(body)
        with self.server.reading:
            rows = read(request)
        if len(rows) > self.server.options.queue:
            raise wire.Refusal(f"{len(rows)} texts, and {self.server.options.queue} may wait; send fewer", 413)
        scores = self.server.batcher.submit(rows).result()
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                what = f"the score of text {place} is {score}, which is not finite: the model's weights are broken"
                raise wire.Refusal(what, 500, wire.NOT_FINITE)
        return shown(request.get("model") or self.server.names[0], scores, sum(map(len, rows)))

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: /metrics counts."""


def _json(body: bytes) -> Any:
    """What a body says.

    Raises:
        Refusal: if it is no JSON.
    """
    try:
        return json.loads(body)
    except ValueError as error:
        raise wire.Refusal(f"the body is no JSON: {error}") from error
    except RecursionError as error:
        raise wire.Refusal("the body is no JSON that can be read: it is nested too deeply") from error


def address(host: str, port: int) -> str:
    """The base address of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Refuse an address that somebody listens at, or that is none of this machine.

    Raises:
        ConfigError: naming it.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise _not_free(host, port, error) from error


def _not_free(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(f"{address(host, port)} cannot be served at: {error}; choose another --host or --port")


def key_of(variable: str, file: Path | None) -> str | None:
    """The bearer token in a file, or else in an environment variable; ``None`` if there is none.

    Raises:
        ConfigError: if the file cannot be read, or what is given is empty or no plain text.
    """
    if file is not None:
        try:
            return checked_key(file.read_text(encoding="utf-8"), str(file))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--key-file {file}: {error}") from error
    return checked_key(os.environ[variable], variable) if variable in os.environ else None


def _metric(name: str, kind: str, meaning: str, values: Mapping[str, float]) -> str:
    full = f"margin_rlhf_{name}"
    lines = [
        f"# HELP {full} {meaning}",
        f"# TYPE {full} {kind}",
        *(f"{full}{key} {value}" for key, value in values.items()),
    ]
    return "\n".join(lines) + "\n"
