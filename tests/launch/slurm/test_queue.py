"""``rlhf slurm status``, ``logs`` and ``cancel`` on the queue of a real SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import ROOT

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture
def submit(cluster, jobs, profile, tiny_recipe, tmp_path):
    """``submit(*settings)`` queues a long reward run; number and log of its job, and its folder."""

    def act(*settings: str) -> tuple[str, Path, Path]:
        output = tmp_path / "run"
        words = ("reward", *tiny_recipe, "--profile", str(profile), f"output={output}", "train.epochs=1000", *settings)
        (number,) = jobs.numbers(cluster.rlhf("slurm", "submit", *words))
        return number, jobs.log(output, number), output

    return act


def line_of(said: str, number: str) -> str:
    (line,) = [line for line in said.splitlines() if f" {number} " in line]
    return line


@pytest.mark.full
def test_a_job_that_runs_is_shown_followed_and_asked_to_save(cluster, jobs, submit):
    number, log, output = submit()
    cluster.until(lambda: jobs.steps(output) > 3, log)
    line = line_of(cluster.rlhf("slurm", "status", str(output)), number)
    assert "RUNNING" in line and "reward: " in line and "/6000" in line
    assert "step 1/6000" in cluster.rlhf("slurm", "logs", str(output))
    words = [sys.executable, "-m", "launch.cli", "slurm", "logs", "--follow", str(output)]
    follower = subprocess.Popen(words, env=cluster.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = cluster.rlhf("slurm", "cancel", str(output))
    assert f"job {number} (job): saves at its next step and ends" in said and f"job {number} (job): ended" in said
    followed = follower.communicate(timeout=60)[0]
    assert "stopped at step" in followed and "saved and stopped by its STOP file" in followed
    assert cluster.state(number) == "FAILED" and cluster.restarts(number) == 0
    assert any((output / "checkpoints").iterdir()) and not (output / "STOP").exists()
    assert "not in the queue" in line_of(cluster.rlhf("slurm", "status", str(output)), number)
    assert "no job of it is in the queue" in cluster.rlhf("slurm", "cancel", str(output), expect=2)


@pytest.mark.full
def test_a_job_that_is_asked_to_go_back_into_the_queue_while_somebody_cancels_it_is_out_of_it(cluster, jobs, submit):
    """Whoever is first: it ends by the request to stop, or goes back into the queue and is canceled there."""
    number, log, output = submit()
    cluster.until(lambda: jobs.steps(output) > 3, log)
    cluster.run("scancel", "--signal=USR1", number)
    said = cluster.rlhf("slurm", "cancel", str(output))
    went_back = f"job {number} (job): had gone back into the queue, canceled there" in said
    assert went_back or f"job {number} (job): ended" in said
    assert cluster.state(number) == "CANCELLED" if went_back else cluster.state(number) not in ("PENDING", "RUNNING")
    assert not (output / "STOP").exists() and any((output / "checkpoints").iterdir())
    assert "not in the queue" in line_of(cluster.rlhf("slurm", "status", str(output)), number)


@pytest.mark.full
def test_a_job_that_goes_back_into_the_queue_while_somebody_waits_for_its_end_is_canceled_there(cluster, jobs, submit):
    """Its ranks stand still, and do not see the request to stop before they are gone."""
    number, log, output = submit()
    cluster.until(lambda: jobs.steps(output) > 3, log)
    cluster.run("scancel", "--signal=STOP", number)
    words = [sys.executable, "-m", "launch.cli", "slurm", "cancel", str(output)]
    waits = subprocess.Popen(words, env=cluster.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    cluster.until((output / "STOP").exists, log)
    cluster.run("scontrol", "requeuehold", number)  # it stays there until somebody looks
    said = waits.communicate(timeout=120)[0]
    assert f"job {number} (job): had gone back into the queue, canceled there" in said
    assert cluster.state(number) == "CANCELLED" and not (output / "STOP").exists()


def test_a_job_that_waits_says_why_and_is_taken_out_of_the_queue(cluster, submit):
    number, _, output = submit("profile.sbatch_options=[--hold]")
    line = line_of(cluster.rlhf("slurm", "status", str(output)), number)
    assert "PENDING" in line and "JobHeldUser" in line
    assert f"no log yet: job {number} is PENDING (JobHeldUser)" in cluster.rlhf("slurm", "logs", str(output), expect=2)
    assert f"job {number} (job): canceled" in cluster.rlhf("slurm", "cancel", str(output))
    assert cluster.state(number) == "CANCELLED"


@pytest.mark.full
def test_with_now_a_job_ends_without_having_saved(cluster, jobs, submit):
    number, log, output = submit("train.checkpoint_every=0")
    cluster.until(lambda: jobs.steps(output) > 3, log)
    assert f"job {number} (job): canceled" in cluster.rlhf("slurm", "cancel", "--now", str(output))
    cluster.until(lambda: cluster.state(number) == "CANCELLED")
    assert not (output / "STOP").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status", "987654"), "job 987654: no run below runs/ was submitted as this one; give its run folder"),
        (("status", "{folder}"), "no run here was submitted to SLURM"),
        (("cancel", "{folder}/odd"), "no job of it is in the queue"),
        (("logs", "{folder}/odd"), "no log yet: job 987654 is not in the queue"),
        (("logs", "{folder}/empty"), "no run here was submitted to SLURM"),
        (("status", "{folder}/broken"), "no run here was submitted to SLURM"),
    ],
)
def test_what_is_not_there_is_one_line(cluster, tmp_path, words, said):
    (tmp_path / "odd" / "slurm").mkdir(parents=True)
    (tmp_path / "odd" / "slurm" / "job.id").write_text("987654\n")
    (tmp_path / "broken" / "slurm").mkdir(parents=True)
    (tmp_path / "broken" / "slurm" / "job.id").touch()
    folder = tmp_path / "odd" / "slurm" if words[1] == "{folder}" else tmp_path
    error = cluster.rlhf("slurm", *(word.format(folder=folder) for word in words), expect=2)
    assert said in error and error.count("\n") == 1
