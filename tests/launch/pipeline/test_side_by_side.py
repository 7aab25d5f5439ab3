"""Stages that do not need each other at the same time: with devices of their own, stopped together, and no different
from one after the other."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch import stages
from launch.jobs import launcher, sharing
from launch.jobs.launcher import Machine
from launch.pipeline import run as running
from launch.pipeline.processes import OWNERS, alone
from launch.pipeline.run import PipelineRun, RunOptions
from launch.runs import NOTES
from rlhf.core.errors import UserError
from rlhf.train.status import read_status

WORKERS = Path(__file__).parent / "workers"
FORK = {
    "start": {"set": {"number": 1}},
    "left": {"set": {"number": 10, "source": "${stages.start.final}", "meets": ["right"]}},
    "right": {"set": {"number": 20, "source": "${stages.start.final}", "meets": ["left"]}},
    "end": {"set": {"number": 100, "source": "${stages.left.final}"}, "after": ["right"]},
}


@pytest.fixture
def toys(toys, monkeypatch):
    """They are started on devices."""
    monkeypatch.setitem(stages.STAGES, "toy", replace(stages.STAGES["toy"], alone=False))
    return toys


@pytest.fixture
def gpus(monkeypatch):
    """A machine with four, two of which have other names."""
    for module in (launcher, sharing):
        monkeypatch.setattr(module, "visible_gpus", lambda: 4)
    monkeypatch.setattr(launcher, "default_ranks", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-aa,MIG-bb,2")


def seen(toys, name: str) -> dict[str, str]:
    return json.loads((toys.folder / "out" / name / "seen").read_text())


def run(toys, machine: Machine, *overrides: str, **options) -> int:
    return PipelineRun(toys.load(*overrides), RunOptions(machine=machine, doctor=False, **options), toys.console).run()


def test_what_fits_runs_at_the_same_time_each_with_devices_of_its_own(toys, gpus):
    sizes = {"start": 1, "left": 1, "right": 1, "end": 1}
    toys.write({name: {**entry, "ranks": sizes[name]} for name, entry in FORK.items()})
    assert run(toys, Machine()) == 0  # left and right wait for each other
    assert [toys.number(name) for name in ("left", "right", "end")] == [11, 21, 111]
    assert [seen(toys, name)["CUDA_VISIBLE_DEVICES"] for name in FORK] == ["7", "7", "GPU-aa", "7"]
    said = toys.said
    assert said.index("left: running") < said.index("right: running") < said.index("left: finished")


def test_what_does_not_fit_waits(toys, gpus):
    """b takes all four; c, which comes later, fits beside a."""
    toys.write({"a": {"ranks": 1}, "b": {}, "c": {"ranks": 1}})
    assert run(toys, Machine()) == 0
    said = toys.said
    assert said.index("c: running") < said.index("a: finished") < said.index("b: running")
    assert said.index("c: finished") < said.index("b: running")
    assert seen(toys, "b")["CUDA_VISIBLE_DEVICES"] == "7,GPU-aa,MIG-bb,2"


def test_without_a_gpu_they_run_side_by_side_when_asked_to_and_share_the_cores(toys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    toys.write(FORK)
    assert run(toys, Machine(ranks=1), at_once=2) == 0
    assert [seen(toys, name)["OMP_NUM_THREADS"] for name in ("left", "right")] == ["4", "4"]
    assert [toys.number(name) for name in ("left", "right", "end")] == [11, 21, 111]


def test_without_being_asked_to_they_run_one_after_the_other(toys):
    toys.write({"a": {}, "b": {}})
    assert run(toys, Machine(ranks=1)) == 0
    said = toys.said
    assert said.index("a: finished") < said.index("b: running")


def test_side_by_side_is_byte_for_byte_what_one_after_the_other_is(toys):
    names = ("left", "right", "end")
    files = {}
    for at_once in (1, 2):
        toys.write({name: {**entry, "set": entry["set"] | {"meets": []}} for name, entry in FORK.items()})
        assert run(toys, Machine(ranks=1), f"output={toys.folder}/{at_once}", at_once=at_once) == 0
        files[at_once] = [(toys.folder / str(at_once) / name / "final" / "number").read_bytes() for name in names]
    assert files[1] == files[2]


def test_a_stage_that_fails_leaves_those_beside_it_alone_and_what_does_not_need_it_still_runs(toys):
    toys.write(FORK | {"other": {"set": {"number": 7}}})
    assert run(toys, Machine(ranks=1), "left.behave=refuse", at_once=2) == 1
    assert toys.number("right") == 21 and toys.number("other") == 7 and toys.starts("end") == 0
    said = toys.said
    assert "left failed" in said and "end failed: not run: it needs left" in said
    assert run(toys, Machine(ranks=1), "left.behave=finish", at_once=2) == 0
    assert toys.starts("right") == 1 and toys.number("end") == 111


def test_what_cannot_be_started_lets_those_at_work_come_to_their_end(toys):
    """Somebody works in the folder of one of them by hand."""
    toys.write({"a": {"set": {"number": 3, "meets": ["b"]}}, "b": {}})
    (toys.folder / "out" / "b").mkdir(parents=True)

    def refuse(folder):
        if folder.name == "b":
            (folder / "seen").touch()
            raise UserError("b: somebody is at work here")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="somebody is at work"):
        patch.setattr(running, "check_not_owned", refuse)
        run(toys, Machine(ranks=1), at_once=2)
    assert toys.number("a") == 3


@pytest.mark.parametrize("way", ["a signal", "a file", "the note of a job"])
def test_a_request_reaches_all_of_them_and_the_same_command_goes_on(toys, way, processes_of):
    toys.write({name: {"set": {"behave": "wait", "number": 1}} for name in ("a", "b")})
    note = toys.folder / "asked"
    process = subprocess.Popen(
        [sys.executable, str(WORKERS / "run_toys.py"), str(toys.path), "train", "two"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "RLHF_ASKED": str(note)},
    )
    wait_for(*(toys.folder / "out" / name / "pid" for name in ("a", "b")))
    if way == "a signal":
        process.send_signal(signal.SIGTERM)
    elif way == "a file":
        (toys.folder / "out" / "STOP").touch()
    else:
        note.write_text("SIGUSR1\nSIGUSR1\n")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert output.count("saves at its next step and stops") == 2 and output.count(": stopped") == 2
    assert processes_of(toys.folder / "out") == [] and not (toys.folder / "out" / "STOP").exists()


def test_a_second_signal_ends_all_of_them(toys, processes_of):
    toys.write({name: {"set": {"behave": "deaf"}} for name in ("a", "b")})
    process = subprocess.Popen([sys.executable, str(WORKERS / "run_toys.py"), str(toys.path), "train", "two"])
    wait_for(*(toys.folder / "out" / name / "pid" for name in ("a", "b")))
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and processes_of(toys.folder / "out") == []


def test_after_one_has_stopped_by_itself_nothing_new_begins_and_the_other_comes_to_its_end(toys, monkeypatch):
    monkeypatch.setitem(stages.STAGES, "toy", replace(stages.STAGES["toy"], trains=True))
    toys.write({"a": {"set": {"behave": "wait"}}, "b": {"set": {"number": 2, "meets": ["later"]}}, "c": {}})

    def stop() -> None:
        wait_for(toys.folder / "out" / "a" / "pid", toys.folder / "out" / "b" / "seen")
        (toys.folder / "out" / "a" / "STOP").touch()
        while read_status(toys.folder / "out" / "a").state != "stopped":
            time.sleep(0.05)
        time.sleep(2 * running.SECONDS_BETWEEN_LOOKS)
        (toys.folder / "out" / "later").mkdir()
        (toys.folder / "out" / "later" / "seen").touch()

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(toys, Machine(ranks=1), at_once=2) == 75
    thread.join()
    assert toys.number("b") == 2 and toys.starts("c") == 0
    assert "a was asked to stop" in toys.said


# Several calls in one folder


def test_calls_on_different_stages_work_in_one_folder_at_the_same_time(toys):
    toys.write({"a": {"set": {"number": 1}}, "b": {"set": {"number": 2}}})
    with alone(toys.load(), ("a",)):
        assert run(toys, Machine(ranks=1), only=("b",)) == 0
        for options, who in (({}, "--only a"), ({"only": ("a",)}, "--only a"), ({"only": ("b", "a")}, "--only a")):
            with pytest.raises(UserError, match=rf"{who}, process {os.getpid()} on .*at work here"):
                run(toys, Machine(ranks=1), **options)
        assert [path.name for path in (toys.folder / "out" / NOTES / OWNERS).glob("*/owner.json")] == ["owner.json"]
    assert run(toys, Machine(ranks=1)) == 0
    assert [toys.starts(name) for name in "ab"] == [1, 1]


def test_a_call_on_one_stage_leaves_the_processes_of_another_alone(toys):
    toys.write({"a": {"set": {"behave": "wait"}}, "b": {"set": {"number": 2}}})
    words = [sys.executable, str(WORKERS / "run_toys.py"), str(toys.path), "train", "only", "a"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    wait_for(toys.folder / "out" / "a" / "pid")
    assert run(toys, Machine(ranks=1), only=("b",)) == 0
    assert process.poll() is None
    (toys.folder / "out" / "STOP").touch()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (toys.folder / "out" / "STOP").exists()  # for all calls in the folder; the next one takes it away
    toys.write({"a": {"set": {"number": 1}}, "b": {"set": {"number": 2}}})
    time.sleep(1.5)  # when a process began is known to about a second
    assert subprocess.run(words).returncode == 0
    assert not (toys.folder / "out" / "STOP").exists()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)
