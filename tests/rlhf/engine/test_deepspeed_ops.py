import logging
import os
import threading
import time

import pytest

from rlhf.core.errors import ConfigError
from rlhf.engine import deepspeed_ops
from rlhf.engine.deepspeed_config import RunValues, resolve
from rlhf.engine.deepspeed_ops import await_builds, find_op, needed_ops, op_problems, require_ops

RUN = RunValues(precision="float32", gradient_clipping=1.0, world_size=1, hidden_size=16, nvme_path="/nvme")


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("zero2", ()),
        ("zero2_offload", ("cpu_adam",)),
        ("zero3_offload", ("cpu_adam",)),
        ("zero3_nvme", ("cpu_adam", "async_io")),
        ("frozen_zero3_offload", ()),
    ],
)
def test_what_offloads_needs_ops(name, ops):
    assert needed_ops(resolve(name, RUN)) == ops


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """A machine without compiler and ninja, and with nothing compiled before."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def test_missing_tools_are_named_with_how_to_get_them(bare_machine):
    op = find_op("cpu_adam")
    assert not op.built and not op.usable
    assert [each.split(" (")[0] for each in op.missing] == ["a C++ compiler", "ninja"]
    assert "apt install g++" in op.missing[0] and "pip install ninja" in op.missing[1]


def test_an_op_that_was_compiled_before_needs_no_tools(bare_machine, tmp_path):
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert find_op("cpu_adam").usable and find_op("cpu_adam").missing


def test_a_missing_library_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(deepspeed_ops, "_has_library", lambda name: False)
    monkeypatch.setattr(deepspeed_ops, "_compiled", lambda name, pattern: [])
    problem = op_problems(resolve("zero3_nvme", RUN))["async_io"]
    assert "apt install libaio-dev" in problem and "offload needs DeepSpeed's op async_io" in problem


def test_a_run_that_deepspeed_would_break_off_is_refused_and_one_with_a_substitute_is_not(bare_machine):
    with pytest.raises(ConfigError, match=r"op async_io .* cannot be built on this machine: missing a C\+\+ compiler"):
        require_ops(resolve("zero3_nvme", RUN))
    require_ops(resolve("zero2_offload", RUN))
    assert "torch's AdamW takes its place" in op_problems(resolve("zero2_offload", RUN))["cpu_adam"]


@pytest.fixture
def build(monkeypatch, tmp_path):
    """The mark of a build of async_io that nothing was written to for ten minutes."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    long_ago = time.time() - 600
    os.utime(lock, (long_ago, long_ago))
    return lock


def test_what_a_killed_build_left_is_removed_by_runs_that_need_the_op_and_by_no_other(build, caplog):
    await_builds(resolve("zero2_offload", RUN))
    assert build.exists()
    await_builds(resolve("zero3_nvme", RUN))
    assert not build.exists() and f"{build}: left by a build of DeepSpeed's op async_io" in caplog.text


def test_a_build_that_a_process_holds_or_that_still_writes_is_waited_for(build, monkeypatch, caplog):
    monkeypatch.setattr(deepspeed_ops, "KILLED_AFTER", 0.5)
    ended = []

    def end() -> None:
        ended.append(time.monotonic())
        build.unlink()

    with build.open(), caplog.at_level(logging.WARNING):  # as torch holds it
        later = threading.Timer(1.0, end)
        later.start()
        await_builds(resolve("zero3_nvme", RUN))
        assert ended and "another run builds DeepSpeed's op async_io" in caplog.text
        assert "killed; removed" not in caplog.text
    build.touch()  # just now, by nobody of this machine
    started = time.monotonic()
    await_builds(resolve("zero3_nvme", RUN))
    assert not build.exists() and 0.4 < time.monotonic() - started < 30
