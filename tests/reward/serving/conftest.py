"""Tiny published reward models, and requests to servers of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from reward.serving.server import RewardServer
from tests.published import published


@pytest.fixture(scope="session")
def final(tmp_path_factory, tiny_model) -> Path:
    return published(tiny_model, tmp_path_factory.mktemp("served") / "final")


@pytest.fixture(scope="session")
def moved(tmp_path_factory, final) -> Path:
    """The same with other weights."""
    folder = tmp_path_factory.mktemp("moved") / "final"
    shutil.copytree(final, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def server(serving, final) -> RewardServer:
    return serving(final)


@pytest.fixture(scope="session")
def post() -> Callable[..., httpx.Response]:
    """``post(server, path, body, **headers)``."""

    def send(server, path: str, body, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(server.url + path, content=content, headers=headers, timeout=30, trust_env=False)

    return send
