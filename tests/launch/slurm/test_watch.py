"""``rlhf slurm status``, ``logs`` and ``cancel``. SLURM's commands are stand-ins."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.cli import main
from launch.slurm import watch
from rlhf.train.status import new_status, write_status

SQUEUE = """#!/bin/sh
case "$*" in
    *"--jobs 7") echo "PENDING|2|0:00|Resources" ;;
    *"--jobs 8") [ -e {folder}/ended ] || echo "RUNNING|4|1:02:03|None" ;;
    *"--jobs 9") echo "error: Unable to contact slurm controller" >&2; exit 1 ;;
    *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def queue(program, tmp_path, monkeypatch):
    """Jobs 7, which waits, and 8, which runs until a file says otherwise; job 9 is one that SLURM is silent about."""
    program("squeue", SQUEUE.format(folder=tmp_path).partition("\n")[2])
    program("scancel", f'echo "$@" >> {tmp_path}/canceled; touch {tmp_path}/ended')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "SECONDS_BETWEEN_REQUESTS", 0.01)
    return tmp_path


def run_of(folder: Path, **numbers: str) -> Path:
    """A run folder with jobs, by label."""
    for label, number in numbers.items():
        (folder / "slurm" / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "slurm" / f"{label}.id").write_text(f"{number}\n{(folder / label).absolute()}\n")
    return folder


def test_status_has_state_nodes_time_and_what_the_run_says_or_waits_for(queue, capsys):
    run = run_of(queue / "runs" / "a", sft="8", reward="7", ppo="6")
    write_status(run / "sft", new_status("sft", phase="training", step=3, total=9))
    write_status(run / "ppo", new_status("ppo", state="failed", reason="out of memory"))
    assert main(["slurm", "status"]) == 0
    lines = {line.split("│")[2].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert all(word in lines["sft"] for word in ("8", "RUNNING", "4", "1:02:03", "step 3/9"))
    assert "PENDING" in lines["reward"] and "Resources" in lines["reward"]
    assert "not in the queue" in lines["ppo"] and "out of memory" in lines["ppo"]


def test_logs_are_those_of_the_last_start_and_go_on_until_the_job_ends(queue, capsys):
    run = run_of(queue / "runs" / "a", job="8")
    log = run / "slurm" / "logs" / "8.log"
    log.write_text("[1] job 8: start 0 on n1\nold\n[2] job 8: start 1 on n2\nnew\n")
    assert main(["slurm", "logs", "8"]) == 0
    assert capsys.readouterr().out.endswith("<==\n[2] job 8: start 1 on n2\nnew\n")
    (queue / "ended").touch()
    assert "".join(watch.follow(log, 4, "8", seconds=0.01)) == log.read_text()[4:]
    (run / "logs" / "sft").mkdir(parents=True)
    (run / "logs" / "sft" / "rank0.log").write_text("of the stage\n")
    assert main(["slurm", "logs", str(run), "--stage", "sft"]) == 0
    assert capsys.readouterr().out.endswith("of the stage\n")
    assert main(["slurm", "logs", str(run), "--stage", "ppo"]) == 2
    assert "no log of a stage ppo; there are those of: sft" in capsys.readouterr().err


def test_cancel_takes_what_waits_out_of_the_queue_and_asks_what_runs_to_save(queue, capsys, monkeypatch):
    run = run_of(queue / "runs" / "a", sft="8", reward="7")
    asked = []

    def sleep(seconds: float) -> None:
        asked.append((run / "STOP").exists())
        (run / "STOP").unlink()  # the run has seen it, or dropped it as one that is older than it is
        if len(asked) == 2:
            (queue / "ended").touch()

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(watch, "cancel_job", lambda number: (queue / "canceled").write_text(number))
    assert main(["slurm", "cancel", str(run)]) == 0
    assert asked == [True, True] and (queue / "canceled").read_text() == "7"
    assert "job 8 (sft): ended" in capsys.readouterr().out and not (run / "STOP").exists()


def test_cancel_takes_out_what_goes_back_into_the_queue_meanwhile(queue, capsys, monkeypatch):
    run = run_of(queue / "runs" / "a", job="8")
    running = watch.queued("8")
    states = iter([running, running, replace(running, state="PENDING")])
    monkeypatch.setattr(watch, "queued", lambda number: next(states))
    assert main(["slurm", "cancel", str(run)]) == 0
    assert "job 8 (job): had gone back into the queue, canceled there" in capsys.readouterr().out
    assert (queue / "canceled").read_text() == "8\n" and not (run / "STOP").exists()


def test_cancel_now_leaves_no_time_to_save(queue):
    run = run_of(queue / "runs" / "a", job="8")
    assert main(["slurm", "cancel", "8", "--now"]) == 0
    assert (queue / "canceled").read_text() == "8\n" and not (run / "STOP").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "12"], "job 12: no run below runs/ was submitted as this one"),
        (["status", "elsewhere"], "elsewhere: no run here was submitted to SLURM"),
        (["logs"], "2 runs were submitted here, give one of them: runs/a, runs/b"),
        (["cancel"], "2 runs were submitted here"),
        (["logs", "7"], "no log yet: job 7 is PENDING (Resources)"),
        (["cancel", "6"], "no job of it is in the queue"),
        (["status", "9"], "Unable to contact slurm controller; is SLURM's controller up?"),
    ],
)
def test_what_cannot_be_found_is_one_line(queue, capsys, words, said):
    run_of(queue / "runs" / "a", job="7")
    run_of(queue / "runs" / "b", job="9" if words[-1] == "9" else "6")
    assert main(["slurm", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_slurm_it_says_so(queue, capsys, monkeypatch):
    run_of(queue / "runs" / "a", job="7")
    monkeypatch.setenv("PATH", str(queue / "empty"))
    assert main(["slurm", "status"]) == 2
    assert "squeue: no such command here" in capsys.readouterr().err
