"""GPUs are counted by torch itself, but only where there can be one."""

import os

from launch.jobs import devices
from launch.jobs.devices import default_ranks, visible_gpus


def test_without_a_driver_there_is_no_gpu_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: 1 / 0)
    assert visible_gpus(tmp_path) == 0


def test_with_a_driver_torch_is_asked_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: True)\n    device_count = staticmethod(lambda: 3)\n"
        "print('a banner')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert visible_gpus(tmp_path) == 3


def test_ranks_are_the_gpus_else_two_where_there_are_two_cores(monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: 8)
    assert default_ranks() == 8
    monkeypatch.setattr(devices, "visible_gpus", lambda: 0)
    for cores in ({0}, {0, 1}, set(range(9))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert default_ranks() == min(2, len(cores))
