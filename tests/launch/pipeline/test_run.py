"""What a pipeline does with its stages: skip, start, continue, redo; and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.core.errors import UserError

WORKERS = Path(__file__).parent / "workers"
CHAIN = {
    "a": {"set": {"number": 1}},
    "b": {"set": {"number": 10, "source": "${stages.a.final}"}},
    "c": {"set": {"number": 100, "source": "${stages.b.final}"}},
}


def test_a_chain_runs_in_order_and_hands_its_results_on(toys):
    toys.write(CHAIN)
    assert toys.run() == 0
    assert [toys.number(name) for name in "abc"] == [1, 11, 111]


def test_what_is_finished_is_not_done_again(toys):
    toys.write(CHAIN)
    toys.run()
    assert toys.run() == 0
    assert [toys.starts(name) for name in "abc"] == [1, 1, 1]


def test_a_changed_setting_redoes_its_stage_and_those_after_it_and_says_why(toys):
    toys.write(CHAIN)
    toys.run()
    toys.said  # noqa: B018
    assert toys.run("b.number=20") == 0
    assert [toys.number(name) for name in "abc"] == [1, 21, 121]
    said = toys.said
    assert "b: done again: number was 10 and is 20" in said
    assert "c: done again: b changed" in said and "a: done again" not in said


def test_a_redo_that_gives_the_same_result_ends_there(toys):
    toys.write(CHAIN)
    toys.run()
    data = toys.folder / "rows.jsonl"
    data.write_text("{}")
    assert toys.run(f"a.data={data}") == 0
    assert toys.starts("b") == 1, "a gave the same number, so b has nothing to do"


def test_changed_data_redoes_its_readers(toys):
    data = toys.folder / "rows.jsonl"
    data.write_text("1")
    toys.write({"a": {"set": {"data": str(data)}}, "b": {}})
    toys.run()
    data.write_text("2")
    toys.run()
    assert f"a: done again: {data} changed" in toys.said
    assert toys.number("b") == 0 and toys.starts("b") == 1


def test_a_cache_that_a_stage_fills_is_no_input_of_it(toys):
    toys.write({"a": {"set": {"cache_dir": str(toys.folder / "cache")}}, "b": {"set": {"source": "${stages.a.final}"}}})
    assert toys.run() == 0 and (toys.folder / "cache").is_dir()
    assert toys.run() == 0
    assert toys.starts("a") == 1


def test_changed_code_redoes_unless_it_is_allowed(toys, monkeypatch):
    toys.write({"a": {}})
    toys.run()
    monkeypatch.setattr("launch.pipeline.fingerprint.code_digest", lambda package: "other")
    assert toys.run(any_code=True) == 0 and toys.starts("a") == 1
    toys.run()
    assert "a: done again: the code of ds_configs changed" in toys.said


@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_a_result_that_was_touched_is_made_again(toys, fault):
    toys.write({"a": {"set": {"number": 4}}})
    toys.run()
    path = toys.folder / "out" / "a" / "final" / "number"
    path.unlink() if fault == "gone" else path.write_text("999")
    assert toys.run() == 0
    assert toys.number("a") == 4


@pytest.mark.parametrize(
    ("behave", "said"), [("refuse", "toy: this cannot work"), ("crash", "exit code 137"), ("lie", "exit code 0")]
)
def test_a_failing_stage_is_reported_and_what_does_not_need_it_still_runs(toys, behave, said):
    toys.write(CHAIN | {"d": {"set": {"number": 5}}})
    assert toys.run(f"b.behave={behave}") == 1
    text = toys.said
    assert "b failed" in text and said in text and "rank0.log" in text
    assert "c failed: not run: it needs b" in text
    assert toys.number("a") == 1 and toys.number("d") == 5
    assert toys.run("b.behave=finish") == 0
    assert [toys.starts(name) for name in "ad"] == [1, 1]


def test_only_runs_what_is_named_and_needs_its_inputs(toys):
    toys.write(CHAIN)
    with pytest.raises(UserError, match="b waits for a: run that first"):
        toys.run(only=("b",))
    assert toys.run(only=("a",)) == 0
    assert toys.run(only=("b",)) == 0
    assert toys.starts("a") == 1 and toys.starts("c") == 0


def test_a_second_pipeline_in_the_same_folder_is_refused(toys):
    toys.write({"a": {}})
    held = toys.folder / "out" / ".pipeline"
    held.mkdir(parents=True)
    script = f"import fcntl, time; f = open({str(held / 'lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
    script += "print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="another pipeline is at work here"):
            toys.run()
    finally:
        other.kill()
        other.wait()
    assert toys.run() == 0


# Signals, and processes that are left


def start(toys, *words: str) -> subprocess.Popen:
    """The pipeline in a process of its own, whose stage a waits."""
    toys.write({"a": {"set": {"behave": "wait"}}, "b": {"set": {"source": "${stages.a.final}"}}})
    return subprocess.Popen(
        [sys.executable, str(WORKERS / "run_toys.py"), str(toys.path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def waiting_stage(toys) -> int:
    """Its process id, once it waits."""
    path = toys.folder / "out" / "a" / "pid"
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_a_training_stage_save_and_stop(toys, number):
    process = start(toys, "train")
    waiting_stage(toys)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "stopped" in output and "the same command goes on from there" in output
    assert toys.processes() == [] and toys.starts("b") == 0


def test_a_stop_file_in_the_folder_of_the_pipeline_does_so_too(toys):
    process = start(toys, "train")
    waiting_stage(toys)
    stop = toys.folder / "out" / "STOP"
    stop.touch()
    process.communicate(timeout=60)
    assert process.returncode == 75 and not stop.exists()


def test_a_second_signal_ends_everything_at_once(toys):
    process = start(toys)  # a stage that does not train is ended by the first
    pid = waiting_stage(toys)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130 or process.returncode == 75
    assert not is_running(pid) and toys.processes() == []


def test_nothing_outlives_a_pipeline_that_was_killed(toys):
    process = start(toys, "train")
    pid = waiting_stage(toys)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while toys.processes() or is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_next_pipeline_ends_what_an_earlier_one_left_and_goes_on(toys):
    process = start(toys, "train")
    pid = waiting_stage(toys)
    guard = [other for other in toys.processes() if other != pid]
    for each in (process.pid, *guard):  # the guard as well: nobody is left to end the stage
        os.kill(each, signal.SIGKILL)
    process.wait()
    assert is_running(pid)
    assert toys.run("a.behave=finish") == 0
    assert not is_running(pid)
