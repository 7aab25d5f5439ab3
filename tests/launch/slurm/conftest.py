"""A real SLURM for tests, shared by all of them."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.lacking import lacking
from tests.slurm import PROGRAMS, SYSTEM, Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM) is None]
    if missing:
        lacking(f"no {', '.join(missing)}: apt-get install slurm-wlm munge (.ci/run does)")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path must be short
    folder.chmod(0o755)
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def profile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "two_nodes.yaml"
    settings = {
        "partition": "main",
        "nodes": 2,
        "devices": 1,
        "device_kind": "cpu",
        "time": "10",
        "interface": "lo",
        "signal_lead_seconds": 20,
        "free_disk_gib": 0.1,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def _steps(output: Path) -> int:
    """Lines of the metrics so far."""
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="session")
def jobs() -> SimpleNamespace:
    """What a submission says, and what a job leaves behind."""
    return SimpleNamespace(
        numbers=lambda said: re.findall(r"submitted job (\d+)", said),
        log=lambda output, number: output / "slurm" / "logs" / f"{number}.log",
        steps=_steps,
    )
