"""An engine in a process of its own, in an environment that has vLLM."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from policy.generation.options import VllmConfig
from policy.generation.vllm.client import EngineLost, Weights
from policy.generation.vllm.engine.margin_engine import TOKEN_VARIABLE
from rlhf.core.errors import ConfigError

OLDEST = (0, 28)
"""The release in which vLLM's weight transfer took its present form."""
INSTALL = "pip install 'margin-rlhf[vllm]'"
NOT_FOR_ENGINES = re.compile(r"(RANK|WORLD_SIZE|LOCAL_.*|MASTER_.*|CROSS_.*|GROUP_.*|ROLE_.*|TORCHELASTIC_.*|PYTHON.*)")
"""Variables of the environment that are those of the trainer's rank, and of its Python."""
POLL_SECONDS = 0.1
STOP_SECONDS = 5.0

_FIND = """
import importlib.util, importlib.metadata as m
if importlib.util.find_spec("vllm"): print(m.version(m.packages_distributions()["vllm"][0]))
"""

log = logging.getLogger(__name__)


def vllm_version(python: str | None) -> str | None:
    """The version of vLLM that this Python (``None``: the one that runs here) has; ``None`` without one.

    Raises:
        ConfigError: if there is no such Python.
    """
    try:
        found = subprocess.run(
            [python or sys.executable, "-P", "-c", _FIND], capture_output=True, text=True, env=_environment()
        )
    except OSError as error:
        raise ConfigError(
            f"vllm.python = {python}: cannot be started ({error.strerror}); give the Python of an environment that has "
            "vLLM, such as .venv-vllm/bin/python"
        ) from error
    return found.stdout.strip() or None


def check_vllm(config: VllmConfig, setting: str) -> None:
    """Refuse to go on without a vLLM that is new enough.

    Args:
        config: of the engines; those that run elsewhere are asked later.
        setting: the section, for messages.
    Raises:
        ConfigError: naming what to install, or what lacks to ask engines elsewhere.
    """
    if config.transport == "nccl" and not torch.cuda.is_available():
        raise ConfigError(
            f"{setting}.vllm.transport = nccl: connects GPUs, and this machine has none that torch sees; take gloo or "
            "folder"
        )
    if config.urls:
        if not os.environ.get(TOKEN_VARIABLE):
            raise ConfigError(
                f"{setting}.vllm.urls = {', '.join(config.urls)}: {TOKEN_VARIABLE} is not set; give it the secret that "
                "the engines were started with"
            )
        return
    version = vllm_version(config.python)
    where = config.python or sys.executable
    elsewhere = f"or give {setting}.vllm.python the Python of an environment that has it (docs/vllm.md)"
    if version is None:
        raise ConfigError(
            f"{setting}.backend = vllm: {where} has no vLLM; install vLLM {'.'.join(map(str, OLDEST))} or later with "
            f"{INSTALL}, {elsewhere}"
        )
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < OLDEST:
        raise ConfigError(
            f"{setting}.backend = vllm: {where} has vLLM {version}, expected {'.'.join(map(str, OLDEST))} or later; "
            f"{INSTALL} --upgrade, {elsewhere}"
        )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the engines of a run are started."""

    config: VllmConfig
    dtype: str
    """Type of the weights, as torch calls it."""
    rows: int
    """Responses that are written together."""
    logprobs: str
    """vLLM's mode of log-probabilities."""
    folder: Path
    """Where logs go."""
    tokenizer: Path
    """Folder of the tokenizer; and of the model's config, where weights are sent as a stream."""


class EngineProcess:
    """Engine ``number`` of a run, on this machine."""

    def __init__(self, launch: Launch, number: int, token: str) -> None:
        self._launch, self._number, self._token = launch, number, token
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0
        self.log = launch.folder / f"engine{number}.log"
        """All that vLLM prints."""

    def start(self, weights: Weights | None) -> str:
        """Start it with these weights, or to be sent some, and wait until it listens; its address.

        Raises:
            EngineLost: if it ends before, or takes too long.
        """
        config = self._launch.config
        ready = self.log.with_suffix(".port")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        ready.unlink(missing_ok=True)
        with self.log.open("ab") as output:
            self._log_begin = output.tell()
            process = self._process = subprocess.Popen(
                [config.python or sys.executable, "-m", "margin_engine", *self._arguments(weights, ready)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        end = time.monotonic() + config.start_seconds
        while not ready.exists():
            if process.poll() is not None:
                raise EngineLost(f"it ended while it started ({self.last_words()})")
            if time.monotonic() > end:
                self.stop()
                raise EngineLost(f"it was not there after {config.start_seconds:g} s (vllm.start_seconds)")
            time.sleep(POLL_SECONDS)
        return f"http://127.0.0.1:{int(ready.read_text())}"

    def stop(self) -> None:
        """End it, and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        for way in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, way)
                process.wait(STOP_SECONDS)
            except (ProcessLookupError, PermissionError):
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def last_words(self) -> str:
        """The last line of the log that says what went wrong, and where the log is."""
        try:
            with self.log.open(errors="replace") as file:
                file.seek(self._log_begin)
                lines = file.read().splitlines()
        except OSError:
            lines = []
        told = [line.strip() for line in lines if re.search(r"\w*(Error|Exception|Killed)\b", line)]
        return f"{told[-1][:300]}; all in {self.log}" if told else f"see {self.log}"

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "it was started"
        return self._process.pid

    def _arguments(self, weights: Weights | None, ready: Path) -> Sequence[str]:
        launch, config = self._launch, self._launch.config
        model = None if weights is None else weights.folder
        given = {
            "model": (model or launch.tokenizer).resolve(),
            "version": 0 if weights is None else weights.version,
            "tokenizer": launch.tokenizer.resolve(),
            "ready": ready.resolve(),
            "dtype": launch.dtype,
            "rows": launch.rows,
            "logprobs": launch.logprobs,
            "tensor-parallel": config.tensor_parallel,
            "cache-gib": config.cache_gib,
            "max-model-tokens": config.max_model_tokens,
            "parent": os.getpid(),
        }
        named = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return [*named, *(["--sleep"] if config.sleep else []), *(["--empty"] if weights is None else [])]

    def _environment(self) -> Mapping[str, str]:
        config, found = self._launch.config, _environment()
        found |= {TOKEN_VARIABLE: self._token, "PYTHONPATH": str(Path(__file__).parent / "engine")}
        if config.devices:
            first = self._number * config.tensor_parallel
            own = config.devices[first : first + config.tensor_parallel]
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
        return found


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not NOT_FOR_ENGINES.fullmatch(name)}
