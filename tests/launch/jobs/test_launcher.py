"""Jobs: their output goes to a log, and nothing of them outlives who asked for them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.jobs.launcher import Machine, stage_command
from launch.stages import STAGES

ROOT = Path(__file__).resolve().parents[3]


def test_a_command_is_logged_and_its_whole_group_ends_with_it(tmp_path):
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nprint('here')\n"
    parent += "time.sleep(60)"
    script = (
        "import sys, pathlib; from launch.jobs.launcher import Job\n"
        f"with Job([sys.executable, '-uc', {parent!r}], pathlib.Path('log.txt')) as job:\n    job.wait(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    written = tmp_path / "child"
    wait_until(lambda: written.exists() and written.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    assert (tmp_path / "log.txt").read_text() == "here\n"
    wait_until(lambda: not is_running(int(written.read_text())))


@pytest.mark.parametrize("machine", [Machine(ranks=3), Machine(hosts={"a": 4, "b": 2}, allocated=True)])
@pytest.mark.parametrize("name", STAGES)
def test_all_ranks_share_the_work_of_every_stage_but_those_of_one_process(name, machine):
    words = stage_command(STAGES[name], ("--config", "x"), machine)
    if STAGES[name].alone:
        assert words == [sys.executable, "-m", STAGES[name].module, "--config", "x"]
    else:
        assert words[words.index("--slots") + 1] == ("4,2" if machine.hosts else "3")
        assert words[words.index("--") + 1 :] == [sys.executable, "-m", STAGES[name].module, "--config", "x"]


def test_a_stage_that_trains_is_never_that_of_one_process():
    assert not any(stage.alone for stage in STAGES.values() if stage.trains)
    assert not any(STAGES[name].alone for name in ("evaluate", "generate", "benchmark"))


def test_without_a_gpu_one_process_evaluates_with_all_threads(monkeypatch):
    monkeypatch.setattr("launch.jobs.launcher.default_ranks", lambda: 2)
    for gpus, training, evaluating in ((0, "2", "1"), (4, "2", "4")):
        monkeypatch.setattr("launch.jobs.launcher.visible_gpus", lambda gpus=gpus: gpus)
        words = {name: stage_command(STAGES[name], (), Machine()) for name in ("reward", "evaluate", "benchmark")}
        slots = {name: found[found.index("--slots") + 1] for name, found in words.items()}
        assert slots == {"reward": training, "evaluate": evaluating, "benchmark": evaluating}


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
