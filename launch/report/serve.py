"""The page of runs that are still going, made anew for each look, for browsers of this machine alone."""

import http.server
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from launch.report.page import plotly_script, render, report_of
from launch.report.reading import METRICS, STUDY
from rlhf.core.errors import UserError
from rlhf.core.files import STATUS, digest
from rlhf.core.findings import EVALUATION

LOOPBACK = "127.0.0.1"
SECONDS = 3.0
"""How often a page asks whether there is something new."""
WATCHED = (STATUS, METRICS, EVALUATION, "held_out.jsonl", "warnings.jsonl", STUDY)


def state_of(folders: Sequence[Path]) -> str:
    """A name for the present state of what a page shows: another one as soon as a step was written."""
    parts = []
    for folder in folders:
        for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
            if path.name in WATCHED:
                stat = path.stat()
                # status.json is written again every few seconds to show that its run lives.
                parts.append(f"{path} {stat.st_size} {'' if path.name == STATUS else stat.st_mtime_ns}")
    return digest(*parts)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers ``/`` with the page and ``/state`` with the name of its state."""

    def __init__(self, folders: Sequence[Path], plotly: str | None, *more: object) -> None:
        self._folders, self._plotly = folders, plotly
        super().__init__(*more)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (LOOPBACK, "localhost"):  # a page of another site whose name leads here
            self._answer(403, "text/plain", "only for this machine\n")
        elif self.path == "/state":
            self._answer(200, "text/plain", state_of(self._folders))
        elif self.path == "/":
            state = state_of(self._folders)
            try:
                page = render(report_of(self._folders), plotly=self._plotly, reload_seconds=SECONDS, state=state)
            except UserError as error:
                self._answer(503, "text/plain", f"{error}\n")
            else:
                self._answer(200, "text/html", page)
        else:
            self._answer(404, "text/plain", "nothing here\n")

    def _answer(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: requests are no news."""


def server_of(folders: Sequence[Path], port: int, *, interactive: bool) -> http.server.ThreadingHTTPServer:
    """A server of the page of ``folders`` on the loopback interface; port 0 takes a free one.

    Raises:
        UserError: if there is no run in them, or the port is taken.
    """
    report_of(folders)
    plotly = plotly_script() if interactive else None
    try:
        return http.server.ThreadingHTTPServer((LOOPBACK, port), partial(_Handler, folders, plotly))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port}: {reason}; give another one, or 0 for a free one") from None
