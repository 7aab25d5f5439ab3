"""Weights that this host, or the container around the process, cannot hold are refused before they are read."""

import pytest
import torch

from rlhf.core import memory
from rlhf.core.errors import ModelError
from rlhf.models.backbones import check_host_memory, load_causal_lm
from rlhf.models.options import BackboneConfig
from rlhf.models.weight_files import checkpoint_bytes

GIB = 2**30


@pytest.fixture
def container(tmp_path, monkeypatch):
    """``container(limit)``: a host with plenty of memory, and a limit around this process."""

    def make(limit: int) -> None:
        group = tmp_path / "sys" / "fs" / "cgroup" / "job"
        for folder in (group, tmp_path / "proc" / "self"):
            folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: {2**30} kB\nMemAvailable: {2**30} kB\n")
        (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job\n")
        (group / "memory.max").write_text(str(limit))
        (group / "memory.current").write_text("0")
        real = memory.host_memory
        monkeypatch.setattr(memory, "host_memory", lambda root=tmp_path: real(root))

    return make


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_model_beyond_the_limit_of_the_container_is_refused(tiny_model, container, monkeypatch, ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    needed = ranks * checkpoint_bytes(tiny_model, torch.float32)
    container(needed)
    with pytest.raises(ModelError, match=r"exit code -9"):
        check_host_memory(BackboneConfig(path=str(tiny_model)), torch.float32)
    container(needed + 1)
    check_host_memory(BackboneConfig(path=str(tiny_model)), torch.float32)


def test_a_process_that_loads_alone_needs_the_memory_of_one(tiny_model, container, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    container(2 * checkpoint_bytes(tiny_model, torch.float32))
    settings = {"dtype": torch.float32, "vocabulary": 1}
    with pytest.raises(ModelError, match=r"8 process\(es\)"):
        load_causal_lm(BackboneConfig(path=str(tiny_model)), **settings)
    load_causal_lm(BackboneConfig(path=str(tiny_model)), **settings, processes=1)
