"""An OpenAI-compatible endpoint in this process, in whatever mood a test wants."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub:
    """An endpoint that says what ``reply`` makes of a question, after the ``moods`` of its first replies.

    What ends with three dots is cut there.
    """

    def __init__(self, reply: Callable[[str], str], moods=()):
        self.moods, self.asked, self.keys, self.bodies = list(moods), Counter(), set(), []
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                text = body["messages"][-1]["content"]
                with stub._lock:
                    stub.asked[text] += 1
                    stub.bodies.append(body)
                    stub.keys.add(self.headers.get("authorization"))
                    mood = stub.moods.pop(0) if stub.moods else "well"
                if mood == "slow":
                    time.sleep(1.0)
                refusals = {"429": ("", 429), "500": ("", 500), "401": ("who are you?", 401), "400": ("too long", 400)}
                answer, status = refusals.get(mood, (None, 200))
                if answer is None:
                    said = {"garbage": "as an AI, I", "both": "A or B", "nothing": None}.get(mood, "")
                    content = reply(text) if said == "" else said
                    reason = "length" if str(content).endswith("...") else "stop"
                    choice = {"message": {"content": content}, "finish_reason": reason}
                    answer = json.dumps({"choices": [choice]})
                    answer = "<html>" if mood == "html" else answer
                try:
                    self.send_response(status)
                    if mood == "429":
                        self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(answer.encode())
                except OSError:  # nobody waits any more
                    pass

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
