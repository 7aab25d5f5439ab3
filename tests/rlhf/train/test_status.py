"""``status.json``: what a run says of itself, and how that is read."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from rlhf.core.errors import ConfigError, RunStopped
from rlhf.core.files import STATUS
from rlhf.engine.ranks import RemoteError
from rlhf.train import status
from rlhf.train.status import (
    Status,
    new_status,
    read_status,
    recording,
    remove_status,
    report_metrics,
    report_phase,
    report_progress,
    report_status,
    take_over_metrics,
    write_status,
)


@pytest.fixture
def writes(monkeypatch) -> list[Status]:
    """Every status that is written."""
    found, write = [], status.write_status
    monkeypatch.setattr(status, "write_status", lambda folder, each: (found.append(each), write(folder, each)))
    return found


def run(folder, *, rank: int = 0, error: BaseException | None = None, monkeypatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    try:
        with recording(folder, "toy"):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", ""),
        (RunStopped("SIGTERM", "at step 3 of 9", 3), "stopped", "stopped at step 3 of 9 by SIGTERM"),
        (ConfigError("lr = 0: too low"), "failed", "lr = 0: too low"),
        (MemoryError("no room"), "failed", "MemoryError: no room"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_how_a_run_ended_is_what_it_says(tmp_path, monkeypatch, error, state, reason):
    run(tmp_path, error=error, monkeypatch=monkeypatch)
    found = read_status(tmp_path)
    assert (found.stage, found.state) == ("toy", state) and found.reason.startswith(reason)
    assert found.rank == (0 if state == "failed" else None)
    assert not found.is_gone


def test_a_phase_is_written_at_once_and_progress_about_once_a_second(tmp_path, monkeypatch, writes):
    with recording(tmp_path, "toy"):
        report_phase("training")
        for step in range(50):
            report_metrics({"loss": 1.0 / (step + 1)}, step=step + 1, total=50)
            report_progress(phase=f"inside step {step}")
            report_phase(f"inside step {step}")
        assert len(writes) == 2
        report_phase("saving")
        assert read_status(tmp_path).phase == "saving" and read_status(tmp_path).step == 50
    assert [each.state for each in writes] == ["running"] * 3 + ["finished"]
    assert writes[-1].metrics == {"loss": 0.02}


def test_values_that_are_not_finite_are_written_as_none(tmp_path):
    with recording(tmp_path, "toy"):
        report_metrics({"loss": float("nan"), "kl": float("inf"), "reward": 1.5})
    assert read_status(tmp_path).metrics == {"loss": None, "kl": None, "reward": 1.5}
    assert "loss" not in read_status(tmp_path).where and "reward 1.5000" in read_status(tmp_path).where


def test_where_a_run_stands_in_words():
    plain = new_status("toy", phase="training", step=3, total=9, eta_seconds=8.4, metrics={"loss": 0.5, "x": 1})
    assert plain.where == "training  step 3/9  ETA 0:00:08  loss 0.5000"
    assert new_status("toy", phase="reading data").where == "reading data"


def test_outside_of_a_run_reports_go_nowhere(tmp_path):
    report_phase("training")
    report_status(step=1)
    report_metrics({"loss": 1.0})
    assert [*tmp_path.iterdir()] == []


def test_metrics_of_an_earlier_process_stay_only_where_its_run_goes_on(tmp_path):
    with recording(tmp_path, "toy"):
        report_metrics({"eval/accuracy": 0.75, "loss": 1.0})
    with recording(tmp_path, "toy"):
        report_metrics({"loss": 0.5})
        take_over_metrics()
    assert read_status(tmp_path).metrics == {"eval/accuracy": 0.75, "loss": 0.5}
    with recording(tmp_path, "toy"):
        pass
    assert read_status(tmp_path).metrics == {}


# Ranks that break


@pytest.mark.parametrize("rank", [1, 7])
def test_a_rank_that_breaks_says_so_beside_the_main_one(tmp_path, monkeypatch, rank):
    write_status(tmp_path, new_status("toy"))
    run(tmp_path, rank=rank, error=ValueError("bad row"), monkeypatch=monkeypatch)
    found = read_status(tmp_path)
    assert (found.state, found.rank, found.reason) == ("failed", rank, "ValueError: bad row")
    assert json.loads((tmp_path / STATUS).read_text())["state"] == "running"


def test_other_ranks_say_nothing_of_a_good_end_or_a_stop(tmp_path, monkeypatch):
    run(tmp_path, rank=1, monkeypatch=monkeypatch)
    run(tmp_path, rank=1, error=RunStopped("SIGTERM", "at step 3"), monkeypatch=monkeypatch)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("waiting", ["passed on", "in a collective"])
def test_the_rank_that_broke_is_the_cause_and_not_those_that_waited_for_it(tmp_path, monkeypatch, waiting):
    """However early these noticed."""
    error = RemoteError("rank 2 failed: ValueError") if waiting == "passed on" else gone_peer(tmp_path)
    run(tmp_path, error=error, monkeypatch=monkeypatch)
    run(tmp_path, rank=1, error=error, monkeypatch=monkeypatch)
    assert read_status(tmp_path).rank == 0
    run(tmp_path, rank=2, error=ValueError("bad row"), monkeypatch=monkeypatch)
    assert (read_status(tmp_path).rank, read_status(tmp_path).reason) == (2, "ValueError: bad row")


def gone_peer(folder) -> BaseException:
    """An error out of a file of torch.distributed."""
    path = folder / "torch" / "distributed" / "c10d.py"
    code = compile("raise RuntimeError('Connection closed by peer')", str(path), "exec")
    try:
        exec(code)
    except RuntimeError as error:
        return error
    raise AssertionError


def test_the_next_start_forgets_what_broke_before_also_of_ranks_that_are_no_more(tmp_path, monkeypatch):
    for rank in (0, 1, 3):
        run(tmp_path, rank=rank, error=ValueError("bad row"), monkeypatch=monkeypatch)
    long_ago = time.time() - 10**6
    for path in tmp_path.glob("status.rank*"):
        os.utime(path, (long_ago, long_ago))
    monkeypatch.setenv("RANK", "0")
    with recording(tmp_path, "toy"):
        assert read_status(tmp_path).state == "running"
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_all_of_it_can_be_removed(tmp_path, monkeypatch):
    for rank in (0, 1):
        run(tmp_path, rank=rank, error=ValueError("bad row"), monkeypatch=monkeypatch)
    remove_status(tmp_path)
    assert [*tmp_path.iterdir()] == [] and read_status(tmp_path) is None


# Processes that are gone


def test_a_process_that_was_killed_no_longer_runs_whatever_it_says(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from rlhf.train.status import recording\n"
        "with recording(Path(sys.argv[1]), 'toy'):\n    print('here', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    assert read_status(tmp_path).state == "running" and not read_status(tmp_path).is_gone
    process.kill()
    process.wait()
    assert read_status(tmp_path).state == "running" and read_status(tmp_path).is_gone


def test_a_process_id_that_is_used_again_is_another_process():
    mine = new_status("toy")
    assert not mine.is_gone
    assert dataclasses.replace(mine, started=mine.started - 100).is_gone


@pytest.mark.parametrize(("seconds", "gone"), [(1, False), (50, False), (70, True), (10**6, True)])
def test_of_another_machine_a_long_silence_means_that_it_is_gone(seconds, gone):
    there = dataclasses.replace(new_status("toy"), machine="elsewhere", updated=time.time() - seconds)
    assert there.is_gone is gone
    assert not dataclasses.replace(there, state="finished").is_gone


def test_a_long_step_is_no_silence(tmp_path, monkeypatch, writes):
    monkeypatch.setattr(status, "SECONDS_BETWEEN_BEATS", 0.05)
    with recording(tmp_path, "toy"):
        deadline = time.monotonic() + 20
        while len(writes) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert writes[-1].updated > writes[0].updated
        assert status.SECONDS_UNTIL_GONE >= 3 * 10.0


@pytest.mark.parametrize("more", [{"added_later": 1}, {"removed": {"a": []}, "metrics": {"eval/accuracy": 0.5}}])
def test_a_status_of_another_version_is_read_without_the_fields_that_are_unknown_here(tmp_path, more):
    known = dataclasses.asdict(new_status("toy", state="finished"))
    (tmp_path / STATUS).write_text(json.dumps(known | more))
    assert read_status(tmp_path).state == "finished"
    assert read_status(tmp_path).metrics == more.get("metrics", {})


@pytest.mark.parametrize(
    "wrong", [{"metrics": []}, {"metrics": {"a": {}}}, {"evaluation": 3}, {"state": "dancing"}, {"step": "x"}]
)
def test_a_status_whose_fields_hold_something_else_is_none(tmp_path, wrong):
    (tmp_path / STATUS).write_text(json.dumps(dataclasses.asdict(new_status("toy")) | wrong))
    assert read_status(tmp_path) is None


def test_a_note_does_not_take_the_place_of_the_cause(tmp_path, monkeypatch):
    error = ValueError("bad row")
    error.add_note("while reading rows.jsonl")
    run(tmp_path, error=error, monkeypatch=monkeypatch)
    assert read_status(tmp_path).reason == "ValueError: bad row"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_folder_that_is_a_file_is_refused_in_words(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    path = tmp_path / "run"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=f"output = {path}: a file"), recording(path, "toy"):
        raise AssertionError
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "evaluation", [{"accuracy": {"low": float("nan")}}, {"rows": [1, (float("inf"), 2)]}, {"path": object}]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_json_does_not_have_hides_no_failure(tmp_path, monkeypatch, evaluation, rank):
    monkeypatch.setenv("RANK", str(rank))
    write_status(tmp_path, new_status("toy"))
    with pytest.raises(ZeroDivisionError), recording(tmp_path, "toy"):
        report_status(evaluation=evaluation)
        raise ZeroDivisionError("the true failure")
    assert read_status(tmp_path).reason == "ZeroDivisionError: the true failure"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "toy"}', '{"unknown": 1}'])
def test_what_is_no_status_is_none(tmp_path, content):
    (tmp_path / STATUS).write_text(content)
    assert read_status(tmp_path) is None


def test_a_disk_that_is_full_ends_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status, "write_status", full)
    with recording(tmp_path, "toy"):
        report_phase("training")
