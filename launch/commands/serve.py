"""``rlhf serve reward``: a published reward model behind HTTP."""

import argparse
import os
import sys
from pathlib import Path

from launch.commands.arguments import Subparsers, chosen, command, group, positive, positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

_REWARD = """\
Answers /classify and /score in vLLM's forms with the rewards that rlhf score gives, /v1/models with the card of the
model, /health, and /metrics for Prometheus. SIGTERM stops it once what was asked is answered. --engine vllm starts
vLLM's own server with the flags that the model needs. rlhf check served compares the scores of either.
"""


def add_parser(subparsers: Subparsers) -> None:
    kinds = group(subparsers, "serve", help="serve a published model", of="what")
    about = "serve a published reward model over HTTP"
    parser = command(kinds, "reward", run_reward, help=about, description=_REWARD)
    parser.add_argument("folder", metavar="DIR", type=home_path, help="final/ folder of a reward run")
    engines = "hf: this program (default); vllm: vLLM's server, in an environment of its own"
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help=engines)
    anyone = "address to listen at (default %(default)s: this machine alone; 0.0.0.0: whoever reaches it)"
    parser.add_argument("--host", default="127.0.0.1", help=anyone)
    parser.add_argument("--port", type=_port, default=8000, help="(default %(default)s)")
    parser.add_argument("--name", default="reward", help="of the model in answers (default %(default)s)")
    types = "of the weights (default auto: bfloat16 on a GPU that has it, else float32; vllm: as they are stored)"
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=types)
    at_once = "padded tokens at once (default %(default)s)"
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help=at_once)
    room = "texts that may wait; more are answered with 503 and Retry-After (default %(default)s)"
    parser.add_argument("--queue", type=positive_int, default=4096, help=room)
    key = "environment variable with a bearer token that requests must bring, if it is set (default %(default)s)"
    parser.add_argument("--key-variable", metavar="NAME", default="MARGIN_RLHF_REWARD_KEY", help=key)
    parser.add_argument("--key-file", metavar="FILE", type=home_path, help="file with that token, in its place")
    python = "with --engine vllm: the Python of its environment (default: $MARGIN_RLHF_VLLM_PYTHON, else this one)"
    parser.add_argument("--vllm-python", metavar="PYTHON", help=python)
    start = "seconds that vLLM may take to become healthy (default %(default)s)"
    parser.add_argument("--start-seconds", type=positive, default=900.0, help=start)


def run_reward(options: argparse.Namespace) -> int:
    from reward.serving.server import ServeOptions, key_of, serve

    folder: Path = options.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the final/ folder of a reward run")
    own = chosen(options, ("folder", "host", "port", "name", "dtype", "batch_tokens", "queue"))
    asked = ServeOptions(key=key_of(options.key_variable, options.key_file), **own)
    if options.engine == "vllm":
        from reward.serving.vllm_server import serve_by_vllm

        python = options.vllm_python or os.environ.get("MARGIN_RLHF_VLLM_PYTHON") or sys.executable
        return serve_by_vllm(asked, python=python, start_seconds=options.start_seconds)
    serve(asked)
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: expected a port, 1 to 65535 (0: any that is free)")
    return int(text)
