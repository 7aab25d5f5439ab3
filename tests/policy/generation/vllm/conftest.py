"""Engines for tests: real ones where vLLM is (``make test-vllm``), and ones that misbehave as they are told."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from policy.building import build_policy
from policy.generation.options import SamplingConfig, VllmConfig
from policy.generation.vllm.client import EngineClient, Weights
from policy.generation.vllm.engine import margin_engine, margin_stream
from policy.generation.vllm.pool import EnginePool
from policy.generation.vllm.sampler import launch_of
from policy.model import PolicyModel
from policy.options import PolicyConfig

SECRET = "a secret of the tests"
AGREE = 1e-4
"""Nats by which float32 log-probabilities may differ; .00003 were seen with SmolLM2."""


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """A Python that has vLLM."""
    found = os.environ.get("MARGIN_RLHF_VLLM_PYTHON")
    if not found:
        pytest.skip("MARGIN_RLHF_VLLM_PYTHON names no Python with vLLM: make test-vllm")
    return found


@pytest.fixture(scope="session")
def engine_options(vllm_python) -> VllmConfig:
    """A small engine in no time."""
    return VllmConfig(python=vllm_python, cache_gib=0.25, max_model_tokens=192, timeout_seconds=60)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Llama with heads as wide as vLLM takes them on a CPU, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def wide_policy(wide_model, tiny_tokenizer) -> Callable[..., PolicyModel]:
    """``wide_policy(**model options)``: a new copy of that model."""

    def build(**options: Any) -> PolicyModel:
        config = PolicyConfig(path=str(wide_model), **options)
        return build_policy(config, dtype=torch.float32, vocabulary=len(tiny_tokenizer), seed=0)

    return build


@pytest.fixture(scope="session")
def shared_pool(tmp_path_factory, engine_options, wide_model) -> Iterator[EnginePool]:
    """An engine for all tests that push weights of the wide model: a start takes long, a push does not."""
    yield from _pool(tmp_path_factory.mktemp("engine"), engine_options, wide_model)


@pytest.fixture(scope="session")
def streamed_pool(tmp_path_factory, engine_options, wide_model) -> Iterator[EnginePool]:
    """The same for tests that send weights as a stream."""
    yield from _pool(tmp_path_factory.mktemp("streamed"), replace(engine_options, transport="gloo"), wide_model)


def _pool(folder: Path, options: VllmConfig, model: Path) -> Iterator[EnginePool]:
    config = SamplingConfig(backend="vllm", batch_rows=32, vllm=options)
    pool = EnginePool(launch_of(config, dtype=torch.float32, folder=folder, tokenizer=model))
    yield pool
    pool.close()


@dataclass
class FakeEngine:
    """Says what it is told to: a stand-in for an engine with or without faults."""

    version: int = 0
    sums: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    answer: Callable[[int], dict[str, Any]] | None = None
    """What it says of a row, by its place; as a rule one token with log-probability -1."""
    hangs: int = 0
    """How many requests for responses it does not answer."""
    breaks_off_after: int | None = None
    """Responses before the stream ends without its last line; once."""
    received: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights that it was sent as a stream."""
    gives_up_after: int | None = None
    """Tensors before it listens no longer; once."""
    hangs_after: int | None = None
    """Tensors before it says nothing for a second, and listens no longer; once."""
    _receiver: Any = None

    def state(self) -> dict[str, Any]:
        versions = {"version": self.version, "newest": self.version, "workers": 1}
        return {**versions, "sums": self.sums, "sleeps": False, "max_model_tokens": 64}

    def update(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._compare(asked)
        self.version, self.sums = asked["version"], asked["sums"]
        if asked["folder"] is None:
            self.sums = margin_engine.weight_sums(self.received.items())
        return {"version": self.version, "sums": self.sums}

    def _compare(self, asked: dict[str, Any]) -> None:
        if asked["version"] <= self.version:
            raise margin_engine.Refused(f"weights of version {asked['version']} came after those of {self.version}")

    def join(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._receiver = margin_stream.Receiver(asked, 1)
        return {}

    def receive(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._compare(asked)
        yield {"listens": True}
        self.received = {}
        for name, tensor in self._receiver:
            self.received[name] = tensor
            if len(self.received) in (self.gives_up_after, self.hangs_after):
                if self.hangs_after is not None:
                    time.sleep(1.0)
                self.gives_up_after = self.hangs_after = self._receiver = None
                return

    def sleep(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {}

    def generate(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if asked["version"] != self.version:
            raise margin_engine.Refused(f"asked for version {asked['version']}, the engine has {self.version}")
        self.asked.append(asked)
        if self.hangs:
            self.hangs -= 1
            time.sleep(1.0)
            return
        for place in range(len(asked["rows"])):
            if place == self.breaks_off_after:
                self.breaks_off_after = None
                return
            yield {"place": place, **(self._usual(place) if self.answer is None else self.answer(place))}

    def _usual(self, place: int) -> dict[str, Any]:
        return {"tokens": [5 + place], "logprobs": [-1.0], "ended": True, "versions": [str(self.version)]}


@pytest.fixture
def fake(monkeypatch) -> Iterator[tuple[FakeEngine, str]]:
    """A fake engine and its address."""
    monkeypatch.setenv(margin_engine.TOKEN_VARIABLE, SECRET)
    engine = FakeEngine()
    handler = type("Handler", (margin_engine.Handler,), {"engine": engine, "token": SECRET})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield engine, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def fake_pool(fake, tmp_path) -> Callable[..., EnginePool]:
    """``fake_pool(**engine options)``: a pool of the fake engine, with new weights: of version 1 in the first one."""

    def make(**options: Any) -> EnginePool:
        config = SamplingConfig(
            backend="vllm",
            vllm=VllmConfig(urls=(fake[1],), **{"timeout_seconds": 5.0, "start_seconds": 3.0, **options}),
        )
        pool = EnginePool(launch_of(config, dtype=torch.float32, folder=tmp_path, tokenizer=tmp_path))
        pool.set_weights(Weights(tmp_path, 1 + pool.newest_version(), {"0": "ab"}))
        return pool

    return make


@pytest.fixture
def client(fake) -> EngineClient:
    return EngineClient(fake[1], SECRET, timeout_seconds=5.0)


@pytest.fixture(scope="session")
def rows() -> list[tuple[list[int], int]]:
    """Prompts of unequal lengths, with seeds."""
    generator = np.random.default_rng(0)
    return [(generator.integers(3, 300, length).tolist(), 7 * length) for length in (9, 3, 14, 3, 6, 1, 9, 11)]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def move(model, noise: float = 0.02, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)


def assert_same(found, expected) -> None:
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=AGREE)
        assert left.ended == right.ended
