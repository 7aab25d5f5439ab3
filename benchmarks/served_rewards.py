"""A reward model behind HTTP: its scores beside those of rlhf score, and many clients of a server that is killed.

    python benchmarks/served_rewards.py --model runs/quickstart/reward/final --output served.json
    python benchmarks/served_rewards.py --model runs/quickstart/reward/final --engine vllm --vllm-python PYTHON

``rlhf serve reward`` is started as a process of its own. First it is asked for 1,000 texts of the quickstart's pairs,
which this process scores as ``rlhf score`` does. Then 32 clients send 10,000 requests of one text each; when 40 % are
answered, the server is killed (SIGKILL) and started anew on the same port. Each answer is compared, each request
counted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from reward.score import load_scorer, score_tokens
from reward.serving.client import RewardServers
from rlhf.core.ports import free_port
from rlhf.data.messages import Message

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ("sentiment_pairs_heldout.jsonl", "sentiment_pairs_train.jsonl")
KILLED_AT = 0.4
"""Share of the answers that are there when the server is killed."""


class Server:
    """``rlhf serve reward`` in a process group of its own."""

    def __init__(self, model: Path, port: int, options: Sequence[str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        own = ["serve", "reward", str(model), "--port", str(port), *options]
        self._command = [sys.executable, "-m", "launch.cli", *own]
        self.start_seconds = self.start()

    def start(self) -> float:
        """Start it, and wait until it is healthy."""
        began = time.monotonic()
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        self._process = subprocess.Popen(self._command, env=environment, start_new_session=True)
        while True:
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with status {self._process.returncode}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return time.monotonic() - began
            except httpx.HTTPError:
                time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        self._process.terminate()
        return self._process.wait(timeout=120)


def conversations(count: int) -> list[list[Message]]:
    """Answers of the quickstart's pairs to their questions, both of each pair."""
    found: list[list[Message]] = []
    for name in PAIRS:
        for line in (ROOT / "launch" / "quickstart" / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked = {"role": "user", "content": row["prompt"]}
            found += [[asked, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
    if count > len(found):
        raise SystemExit(f"--texts {count}: the quickstart has {len(found)}")
    return found[:count]


def hammered(
    server: Server, talks: Sequence[list[Message]], expected: Sequence[float], requests: int, clients: int, share: float
) -> dict[str, Any]:
    """Many clients at one time, and a server that is killed in between.

    Args:
        server: it runs, and runs again afterwards.
        talks, expected: conversations with their scores.
        requests: of one conversation each.
        clients: which send them, one after the other each.
        share: of the deviation of rewards that a score may be off.
    """
    lock, answered, failures = threading.Lock(), [0], []
    wrong = [0]
    worst = [0.0]
    one = RewardServers([server.url])
    tolerance = share * (one.card.deviation or 1.0)
    own = [RewardServers([server.url], concurrency=1, first_wait=0.2) for _ in range(clients)]

    def work(number: int) -> None:
        for place in range(number, requests, clients):
            text = place % len(talks)
            try:
                (score,) = own[number].score_conversations([talks[text]])
            except Exception as error:
                with lock:
                    failures.append(str(error))
                continue
            off = abs(score - expected[text])
            with lock:
                answered[0] += 1
                worst[0] = max(worst[0], off)
                wrong[0] += not off <= tolerance

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        working = [pool.submit(work, number) for number in range(clients)]
        while answered[0] < KILLED_AT * requests and not all(each.done() for each in working):
            time.sleep(0.01)
        before = answered[0]
        server.kill()
        down = server.start()
        for each in working:
            each.result()
    seconds = time.monotonic() - began
    return {
        "requests": requests,
        "clients": clients,
        "answered": answered[0],
        "answered before the kill": before,
        "wrong": wrong[0],
        "tolerance": tolerance,
        "worst": worst[0],
        "failed, and told": len(failures),
        "faults": sorted(set(failures))[:3],
        "lost": requests - answered[0] - len(failures),
        "tried again": sum(each.retried for each in own),
        "seconds": seconds,
        "seconds without a server": down,
        "requests a second": requests / (seconds - down),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="final/ folder of a reward run")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of the deviation of rewards")
    parser.add_argument("--output", type=Path)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    talks = conversations(options.texts)
    model, chat = load_scorer(options.model)
    began = time.monotonic()
    rows = [chat.encode(talk[:1], talk[1:])[0] for talk in talks]
    expected = score_tokens(model, rows, batch_tokens=8192)
    alone = time.monotonic() - began
    engine = ["--engine", options.engine, "--dtype", "float32"]
    engine += ["--vllm-python", options.vllm_python] if options.engine == "vllm" else []
    server = Server(options.model, free_port(), engine)
    try:
        servers = RewardServers([server.url])
        began = time.monotonic()
        served = servers.score_conversations(talks)
        seconds = time.monotonic() - began
        found: dict[str, Any] = {
            "engine": options.engine,
            "card": str(servers.card),
            "start seconds": server.start_seconds,
            "texts": {
                "count": len(talks),
                "tokens": sum(map(len, rows)),
                "worst": max(abs(one - other) for one, other in zip(served, expected, strict=True)),
                "allowed": options.tolerance * (servers.card.deviation or 1.0),
                "seconds": seconds,
                "seconds in one process": alone,
            },
        }
        print(json.dumps(found, indent=2), flush=True)
        if options.requests:
            found["hammered"] = hammered(server, talks, expected, options.requests, options.clients, options.tolerance)
        found["status at the end"] = server.stop()
    except BaseException:
        server.kill()
        raise
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
