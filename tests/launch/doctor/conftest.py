"""Machines that lack something."""

import os
import subprocess
from pathlib import Path

import pytest

from launch.doctor import PlannedStage
from reward.config import RewardConfig
from rlhf.config import load_config


@pytest.fixture
def program(tmp_path, monkeypatch):
    """``program(name, script)`` puts a shell script of that name first in PATH."""
    folder = tmp_path / "bin"

    def make(name: str, script: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        if not os.environ["PATH"].startswith(f"{folder}:"):
            monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return make


@pytest.fixture
def no_programs(tmp_path, monkeypatch) -> Path:
    """A machine without a single program in PATH, and without compiled ops."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def stage(tiny_recipe):
    """``stage(key=value, ...)``: a tiny reward run with its validated recipe."""

    def load(*overrides: str) -> PlannedStage:
        config = load_config(RewardConfig, [Path(tiny_recipe[1])], overrides, program="test")
        return PlannedStage(kind="reward", config=config)

    return load
