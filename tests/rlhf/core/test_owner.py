"""One run at a time in a folder, on any file system, and nobody waits for the dead."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rlhf.core import owner
from rlhf.core.errors import ConfigError
from rlhf.core.files import OWNER
from rlhf.core.owner import Owned, Owner, check_not_owned, owning
from rlhf.train.status import recording

ROOT = Path(__file__).resolve().parents[3]
ELSEWHERE = {"machine": "node7 pid:[1]", "host": "node7", "process": 5}


@pytest.fixture
def other(tmp_path):
    """``other(**changes)`` puts an owner file of another process into the folder."""

    def write(**changes) -> Owner:
        found = replace(Owner(what="reward"), **changes)
        (tmp_path / OWNER).write_text(json.dumps(asdict(found)))
        return found

    return write


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(owner, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(owner, "SECONDS_UNTIL_STALE", 0.6)


def start(folder: Path) -> subprocess.Popen:
    """A process that owns ``folder``."""
    script = (
        "import sys, time, pathlib; from rlhf.core.owner import owning\n"
        "with owning(pathlib.Path(sys.argv[1]), 'sft'): print('owns', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "12"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owns\n"
    return process


def test_a_second_run_is_refused_with_the_name_of_the_first_and_may_begin_when_that_was_killed(tmp_path, caplog):
    first = start(tmp_path)
    try:
        where = rf"{tmp_path}: sft, process {first.pid} on {os.uname().nodename}, job 12, is at work here; .*STOP"
        for attempt in (lambda: check_not_owned(tmp_path), recording(tmp_path, "reward").__enter__):
            with pytest.raises(Owned, match=where):
                attempt()
        assert not (tmp_path / "status.json").exists(), "the status is that of the owner"
    finally:
        first.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # not reaped: it is a zombie
    with recording(tmp_path, "reward"):
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()
    assert "taken over from sft" in caplog.text and not (tmp_path / OWNER).exists()
    first.wait()


@pytest.mark.parametrize("fault", [errno.ENOSYS, errno.ENOLCK])
def test_no_lock_of_the_file_system_is_needed_nor_hard_links(tmp_path, monkeypatch, fault):
    def missing(*_):
        raise OSError(fault, os.strerror(fault))

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(os, "link", no_links)
    with owning(tmp_path, "reward"), pytest.raises(Owned):
        check_not_owned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_machine_lives_as_long_as_its_heart_beats(tmp_path, other, fast):
    other(**ELSEWHERE)
    beating = threading.Event()

    def beat() -> None:
        while not beating.wait(0.1):
            os.utime(tmp_path / OWNER)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Owned, match="process 5 on node7"), owning(tmp_path, "sft"):
            pass
    finally:
        beating.set()
        thread.join()
    with owning(tmp_path, "sft"):
        assert json.loads((tmp_path / OWNER).read_text())["what"] == "sft"


def test_the_owner_keeps_its_heart_beating(tmp_path, fast):
    with owning(tmp_path, "sft"):
        before = (tmp_path / OWNER).stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / OWNER).stat().st_mtime_ns > before


def test_a_job_that_was_requeued_to_another_node_does_not_wait_for_itself(tmp_path, other, monkeypatch):
    other(**ELSEWHERE, job="7", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with owning(tmp_path, "sft"):
        assert time.monotonic() - began < 5


def test_a_process_that_was_taken_for_dead_ends_when_it_finds_another_in_its_place(tmp_path, other, fast, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(owner, "_end", said.append)
    with owning(tmp_path, "sft"):
        other(**ELSEWHERE)
        deadline = time.monotonic() + 10
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "taken over by reward, process 5 on node7" in said[0]
    assert (tmp_path / OWNER).exists(), "it is not its own any more"


def test_of_many_that_find_a_stale_file_one_becomes_the_owner(tmp_path, other, fast):
    other(process=2**22 + 1)
    won, lost, begin, end = [], [], threading.Barrier(8), threading.Event()

    def contend() -> None:
        begin.wait()
        try:
            with owning(tmp_path, "sft"):
                won.append(1)
                end.wait(20)
        except Owned:
            lost.append(1)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(won) + len(lost) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    end.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


@pytest.mark.parametrize("folder", ["/proc/1/nothing/run", "/sys/kernel/run"])
def test_a_folder_that_cannot_be_written_to_is_one_line(folder):
    with pytest.raises(ConfigError, match=rf"output = {folder}: cannot be written to: .*; give another output"):
        recording(Path(folder), "sft").__enter__()
