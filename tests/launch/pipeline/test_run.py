"""What a pipeline does with its stages: skip, start, continue, redo; and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.jobs.log import meaning
from launch.pipeline.overview import status_table
from launch.pipeline.processes import alone
from launch.pipeline.started import Logs
from launch.pipeline.state import Progress
from rlhf.core.errors import UserError
from rlhf.train.status import new_status, read_status, recording, write_status

WORKERS = Path(__file__).parent / "workers"
NO_PARTS = {"settings": {}, "inputs": {}, "code": {}, "versions": {}}
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
    with alone(toys.load()), pytest.raises(UserError, match=rf"a pipeline, process {os.getpid()} on .*at work here"):
        toys.run()
    assert toys.run() == 0


def test_a_second_pipeline_by_another_way_to_the_same_folder_is_refused(toys):
    """Through a link, and as a sweep or a recipe of another name would."""
    toys.write({"a": {}})
    (toys.folder / "out").mkdir()
    (toys.folder / "link").symlink_to(toys.folder / "out")
    with alone(toys.load()):
        for options in ({}, {"only": ("a",)}):
            with pytest.raises(UserError, match=rf"a pipeline, process {os.getpid()} on .*at work here"):
                toys.run(f"output={toys.folder}/link", **options)


def test_a_stage_that_somebody_runs_by_hand_is_left_alone(training_toys):
    toys = training_toys
    toys.write({"a": {"set": {"number": 1}}})
    assert toys.run() == 0
    folder = toys.folder / "out" / "a"
    with recording(folder, "toy"):
        before = (folder / "status.json").read_bytes()
        with pytest.raises(UserError, match=rf"out/a: toy, process {os.getpid()} on .*at work here"):
            toys.run("a.number=2")
        assert (folder / "status.json").read_bytes() == before and (folder / "done.json").exists()
    assert toys.run("a.number=2") == 0 and toys.number("a") == 2


# References that are not written as such


@pytest.mark.parametrize("way", ["a variable", "a path"])
def test_a_result_that_is_named_by_its_path_is_waited_for_and_looked_at(toys, way):
    source = "${vars.number}" if way == "a variable" else f"{toys.folder}/out/a/final"
    stages = {"b": {"set": {"number": 10, "source": source}}, "a": {"set": {"number": 1}}}
    toys.write(stages, vars={"number": "${stages.a.final}"})
    assert toys.load().named("b").needs == ("a",)
    assert toys.run() == 0 and toys.number("b") == 11
    assert toys.run("a.number=2") == 0 and toys.number("b") == 12
    assert "b: done again: a changed" in toys.said


# Results that no longer count


@pytest.mark.parametrize("behave", ["finish", "refuse", "crash"])
def test_earlier_runs_are_kept_beside_the_new_one_however_many_and_however_far_they_came(training_toys, behave):
    toys, out = training_toys, training_toys.folder / "out"
    toys.write({"a": {"set": {"number": 1}}})
    assert toys.run() == 0 and [path.name for path in out.glob("a*")] == ["a"]
    code = toys.run("a.number=2", "a.steps=3", f"a.behave={behave}")
    assert toys.run("a.number=3", f"a.behave={behave}") == code == (0 if behave == "finish" else 1)
    assert (out / "a.before" / "final" / "number").read_text() == "1"
    assert (out / "a.before-2" / "starts").is_file()
    assert toys.run("a.number=4") == 0 and (out / "a.before-3" / "starts").is_file()


def test_a_pipeline_killed_while_it_puts_a_run_aside_loses_none(training_toys, monkeypatch):
    toys = training_toys
    toys.write({"a": {"set": {"number": 1}}})
    assert toys.run() == 0

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            toys.run("a.number=2")
    assert toys.number("a") == 1
    assert toys.run("a.number=2") == 0 and toys.number("a") == 2
    assert (toys.folder / "out" / "a.before" / "final" / "number").read_text() == "1"


@pytest.mark.parametrize("call", ["remove_status", "write_json", "write_status"])
def test_a_pipeline_killed_while_it_starts_a_stage_takes_no_earlier_result_for_the_new_one(toys, monkeypatch, call):
    toys.write({"a": {"set": {"number": 1}}})
    assert toys.run() == 0

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"launch.pipeline.state.{call}", killed)
        with pytest.raises(KeyboardInterrupt):
            toys.run("a.number=2")
    assert toys.run("a.number=2") == 0 and toys.number("a") == 2


def test_a_status_without_the_completion_marker_is_no_end(toys):
    toys.write({"a": {}})
    progress, (stage,) = Progress(toys.load()), toys.load().stages
    progress.start(stage, progress.decide(stage))
    write_status(stage.output, new_status("toy", state="finished"))
    progress.settle(stage)
    assert progress.read(stage)["state"] == "started"
    (stage.output / "done.json").write_text("{}")
    progress.settle(stage)
    assert progress.read(stage)["state"] == "finished"


@pytest.mark.parametrize("published", ["nothing", "a number"])
def test_a_finished_run_whose_folder_is_gone_is_made_again(toys, published):
    toys.write({"a": {"set": {"number": 4}}})
    assert toys.run() == 0
    if published == "nothing":
        path = toys.folder / "out" / ".pipeline" / "a.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    shutil.rmtree(toys.folder / "out" / "a")
    assert toys.run() == 0
    assert toys.number("a") == 4 and "is gone" in toys.said


def test_folders_that_hold_something_else_are_refused_before_the_first_stage_starts(training_toys):
    toys = training_toys
    toys.write({"a": {}, "b": {}, "c": {}})
    for name in "bc":
        (toys.folder / "out" / name).mkdir(parents=True)
        (toys.folder / "out" / name / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out/b, .*out/c: holds something.*b.output=FOLDER c.output=FOLDER"):
        toys.run()
    assert toys.starts("a") == 0
    assert toys.run(only=("a",)) == 0


def test_a_stage_that_died_without_a_word_is_shown_as_failed(toys):
    toys.write({"a": {"set": {"behave": "crash"}}})
    assert toys.run() == 1
    found = read_status(toys.folder / "out" / "a")
    assert found.state == "failed" and found.reason.startswith("exit code 137")


# How much work deciding is


@pytest.mark.parametrize("count", [12, 16])
def test_each_stage_is_looked_at_once_however_many_build_on_it(toys, monkeypatch, count):
    names = [f"s{number}" for number in range(count)]
    toys.write({name: {"after": names[:place]} for place, name in enumerate(names)})
    pipeline, looked = toys.load(), []
    monkeypatch.setattr("launch.pipeline.state.parts_of", lambda stage, *_: looked.append(stage.name) or NO_PARTS)
    progress = Progress(pipeline)
    for stage in pipeline.stages:
        progress.start(stage, progress.decide(stage))
        progress.finish(stage, 1.0)
    looked.clear()
    status_table(pipeline, Progress(pipeline, writes=False))
    assert looked == names
    looked.clear()
    assert toys.run() == 0
    assert looked == names


# Why a stage failed


def test_the_rank_that_broke_is_quoted_with_its_log(tmp_path):
    (tmp_path / "rank1.log").touch()
    status = new_status("toy", state="failed", rank=1, reason="torch.OutOfMemoryError: CUDA out of memory")
    said = f"rank 1: torch.OutOfMemoryError: CUDA out of memory\n  its log: {tmp_path / 'rank1.log'}"
    assert Logs(tmp_path).cause(status) == said


def test_a_log_that_is_not_there_is_not_named(tmp_path):
    (tmp_path / "launcher.log").write_text("ConfigError: cannot be imported\n")
    status = new_status("toy", state="failed", rank=0, reason="ConfigError: cannot be imported")
    assert Logs(tmp_path).cause(status).endswith(f"its log: {tmp_path / 'launcher.log'}")


@pytest.mark.parametrize("name", ["rank0", "launcher"])
def test_a_stage_that_was_killed_without_a_word_is_shown_by_the_end_of_its_log(tmp_path, name):
    logs = Logs(tmp_path)
    (tmp_path / f"{name}.log").write_text("step 1/9\nlast words\n")
    for status in (None, new_status("toy", phase="training")):
        assert logs.cause(status) == f"last words\n  its log: {tmp_path / f'{name}.log'}"


def test_a_killed_rank_is_no_riddle():
    assert "out of host memory" in meaning(247) and meaning(2) == "exit code 2"


# Signals, and processes that are left


def start(toys, *words: str, behave: str = "wait", before: str = "") -> subprocess.Popen:
    """The pipeline in a process of its own, whose stage a waits; ``before``: commands of the shell that starts it."""
    toys.write({"a": {"set": {"behave": behave}}, "b": {"set": {"source": "${stages.a.final}"}}})
    return subprocess.Popen(
        ["bash", "-c", f'{before}exec "$@"', "-", sys.executable, str(WORKERS / "run_toys.py"), str(toys.path), *words],
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


def test_a_signal_that_is_ignored_stays_ignored(toys):
    """nohup rlhf pipeline run ... &"""
    process = start(toys, "train", before="trap '' HUP; ")
    waiting_stage(toys)
    process.send_signal(signal.SIGHUP)
    time.sleep(2)
    assert process.poll() is None and len(toys.processes()) >= 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_stop_file_in_the_folder_of_the_pipeline_does_so_too(toys):
    process = start(toys, "train")
    waiting_stage(toys)
    stop = toys.folder / "out" / "STOP"
    stop.touch()
    process.communicate(timeout=60)
    assert process.returncode == 75 and not stop.exists()


def test_a_stage_that_does_not_train_is_ended_by_the_first_signal(toys):
    process = start(toys)
    pid = waiting_stage(toys)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not is_running(pid) and toys.processes() == []


def test_signals_of_one_moment_are_one_request(toys):
    process = start(toys, "train")
    waiting_stage(toys)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_second_signal_ends_a_stage_that_takes_too_long_to_stop(toys):
    process = start(toys, "train", behave="deaf")
    pid = waiting_stage(toys)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None and is_running(pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not is_running(pid) and toys.processes() == []


def test_grace_has_an_end(toys):
    process = start(toys, "train", "hasty", behave="deaf")
    pid = waiting_stage(toys)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not is_running(pid) and toys.processes() == []
    assert read_status(toys.folder / "out" / "a").state == "stopped"


def test_a_crash_on_the_way_to_a_stop_is_a_failure(toys):
    process = start(toys, "train", behave="wait and crash")
    waiting_stage(toys)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "a failed: exit code 1: RuntimeError: cannot save" in output


def test_a_stage_still_saves_when_nobody_reads_any_more(toys):
    """Ctrl-C on ``rlhf pipeline run ... | tee log`` ends tee as well."""
    process = start(toys, "train")
    waiting_stage(toys)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    log = (toys.folder / "out" / "logs" / "a" / "rank0.log").read_text()
    assert "stopped at step 1 of 9 by the file STOP" in log


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
    for each in (*guard, process.pid):  # the guard first: nobody is left to end the stage
        os.kill(each, signal.SIGKILL)
    process.wait()
    assert is_running(pid)
    assert toys.run("a.behave=finish") == 0
    assert not is_running(pid)
