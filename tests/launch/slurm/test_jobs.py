"""Jobs of two nodes on a real SLURM: stopped, requeued, continued, with a node lost, and refused.

Every claim of a job that goes on is checked against a run that nothing disturbed: same metrics, same weights.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from launch.jobs.hostfile import read_hostfile

ROOT = Path(__file__).resolve().parents[3]
LONG = ("train.epochs=10",)  # 60 steps: long enough to be disturbed several times


@pytest.fixture
def submit(cluster, jobs, profile, tiny_recipe):
    """``submit(output, *settings)`` queues a reward run; number and log of the job."""

    def act(output: Path, *settings: str) -> tuple[str, Path]:
        words = ("reward", *tiny_recipe, "--profile", str(profile), f"output={output}", *settings)
        return jobs.numbers(cluster.rlhf("slurm", "submit", *words))[0], output

    return act


@pytest.fixture(scope="module")
def one_node(tiny_recipe, run_ranks, runs, tmp_path_factory) -> Path:
    """The folder of a short run of two ranks without SLURM."""
    output = tmp_path_factory.mktemp("one_node")
    run_ranks(["-m", "reward", *tiny_recipe, f"output={output}", "train.publish=none"])
    assert len(runs.rows(output)) == 12
    return output


def assert_same_run(runs, found: Path, expected: Path) -> None:
    assert runs.rows(found) == runs.rows(expected)
    assert runs.rows(found, "eval") == runs.rows(expected, "eval")
    ours, theirs = (AutoModelForSequenceClassification.from_pretrained(each / "final") for each in (found, expected))
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


@pytest.fixture(scope="module")
def undisturbed(cluster, jobs, profile, tiny_recipe, tmp_path_factory) -> Path:
    """The folder of the long run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    words = ("reward", *tiny_recipe, "--profile", str(profile), f"output={output}", *LONG)
    (number,) = jobs.numbers(cluster.rlhf("slurm", "submit", *words))
    cluster.wait(number, "COMPLETED", jobs.log(output, number))
    return output


@pytest.mark.dist
@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_on_one(undisturbed, jobs, one_node, runs):
    """The learning rate is constant, so that a short run is the beginning of a long one."""
    runs.assert_close(runs.rows(undisturbed)[:12], runs.rows(one_node), 2e-4)
    (hostfile,) = (undisturbed / "slurm").glob("hostfile-*")
    assert hostfile.read_text() == "node1 slots=1\nnode2 slots=1\n"
    log = jobs.log(undisturbed, hostfile.name.partition("-")[2]).read_text()
    assert "ZeRO-2" in log and "2 rank(s)" in log


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.full
def test_two_nodes_under_zero3_train_as_two_ranks_on_one(cluster, jobs, submit, one_node, runs, tmp_path):
    number, output = submit(tmp_path / "zero3", "engine.deepspeed=zero3", "train.publish=none")
    cluster.wait(number, "COMPLETED", jobs.log(output, number))
    assert json.loads((output / "done.json").read_text())["step"] == 12
    runs.assert_close(runs.rows(output), runs.rows(one_node), 2e-4)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "ways"),
    [
        ("USR1", [()]),
        pytest.param("USR1", [("--batch",), ("--full",)], marks=pytest.mark.full),
        pytest.param("TERM", [(), ("--batch",)], marks=pytest.mark.full),
    ],
    ids=["to the steps", "to the shell, to all", "a request to end, to the steps, to the shell"],
)
def test_every_way_to_signal_a_job_saves_requeues_and_goes_on_to_the_same_result(
    cluster, jobs, submit, undisturbed, runs, tmp_path, signal, ways
):
    """Signals go to the steps, to the batch shell, or to both with all their processes."""
    number, output = submit(tmp_path / "run", *LONG)
    log = jobs.log(output, number)
    for restart, options in enumerate(ways, start=1):
        seen = jobs.steps(output)
        cluster.until(lambda seen=seen: jobs.steps(output) > seen + 3, log)
        cluster.run("scancel", f"--signal={signal}", *options, number)
        cluster.wait_for_restart(number, restart, log)
        assert not (output / "STOP").exists()
        assert not (output / "done.json").exists()
    cluster.wait(number, "COMPLETED", log)
    text = log.read_text()
    assert text.count(f"saved and stopped on SIG{signal}: back into the queue") == cluster.restarts(number) == len(ways)
    assert text.count("resuming from") == cluster.restarts(number)
    assert_same_run(runs, output, undisturbed)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.full
def test_a_job_that_is_preempted_saves_in_its_grace_and_goes_on_when_there_is_room_again(
    cluster, jobs, submit, undisturbed, runs, tmp_path
):
    """PreemptMode=REQUEUE with GraceTime: SLURM sends SIGTERM, and a job that ends by itself is not requeued by it."""
    number, output = submit(tmp_path / "run", *LONG, "profile.partition=spare")
    log = jobs.log(output, number)
    cluster.until(lambda: jobs.steps(output) > 3, log)
    urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", "-N4", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait_for_restart(number, 1, log)
    cluster.wait(number, "COMPLETED", log)
    assert cluster.state(urgent.stdout.strip()) == "COMPLETED"
    assert "saved and stopped on SIGTERM: back into the queue" in log.read_text()
    assert cluster.restarts(number) == 1
    assert_same_run(runs, output, undisturbed)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.full
def test_a_job_that_is_canceled_is_not_put_back_into_the_queue(cluster, jobs, submit, tmp_path):
    number, output = submit(tmp_path / "run", *LONG)
    log = jobs.log(output, number)
    cluster.until(lambda: jobs.steps(output) > 3, log)
    cluster.run("scancel", number)
    cluster.until(lambda: cluster.state(number) == "CANCELLED")
    assert "back into the queue" not in log.read_text() and cluster.restarts(number) == 0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.full
def test_a_job_near_its_time_limit_saves_and_goes_on_until_a_stop_file_ends_it(cluster, jobs, submit, tmp_path):
    """The limit comes near only when the run is at work, however long a start takes on this machine."""
    number, output = submit(tmp_path / "run", "train.epochs=10000", "profile.signal_lead_seconds=150")
    log = jobs.log(output, number)
    cluster.until(lambda: jobs.steps(output) > 3, log)
    minutes = cluster.run_seconds(number) // 60 + 3
    cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
    cluster.until(lambda: "saved and stopped on SIGUSR1: back into the queue" in log.read_text(), log)
    # Before it starts again: SLURM may send the signal a minute early, which would be at the next start.
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    cluster.wait_for_restart(number, 1, log)
    saved = max(int(path.name.partition("-")[2]) for path in (output / "checkpoints").glob("step-*"))
    cluster.until(lambda: jobs.steps(output) > saved + 3, log)
    assert f"at step {saved}" in log.read_text().partition("resuming from")[2]
    (output / "STOP").touch()
    cluster.wait(number, "FAILED", log)
    assert "saved and stopped by its STOP file" in log.read_text()
    assert cluster.restarts(number) == 1


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.full
def test_a_job_that_loses_a_node_goes_on_from_its_checkpoint(cluster, jobs, submit, undisturbed, runs, tmp_path):
    """The first loss is noticed by the job itself, the second by SLURM."""
    patience = ("profile.probe_seconds=15", "profile.srun_options=[--wait=15]")
    number, output = submit(tmp_path / "run", *LONG, "train.checkpoint_every=10", *patience)
    log = jobs.log(output, number)

    def nodes() -> list[str]:
        return [*read_hostfile(output / "slurm" / f"hostfile-{number}")]

    cluster.until(lambda: jobs.steps(output) > 12, log)
    first = nodes()
    cluster.kill_node(first[-1])
    cluster.until(lambda: cluster.restarts(number) == 1, log)
    cluster.declare_lost(first[-1])
    cluster.until(lambda: "resuming from" in log.read_text() and jobs.steps(output) > 22, log)
    second = nodes()
    cluster.kill_node(second[-1])
    cluster.declare_lost(second[-1])
    cluster.wait(number, "COMPLETED", log)
    cluster.mend_node(first[-1])
    cluster.mend_node(second[-1])
    text = log.read_text()
    assert first[-1] not in second and {*nodes()}.isdisjoint({first[-1], second[-1]})
    assert text.count("a node does not answer") == 1 and "DUE TO NODE FAILURE" in text
    assert text.count("resuming from") == 2
    assert_same_run(runs, output, undisturbed)


def refused(cluster, profile: Path, tiny_recipe, output: Path, *settings: str) -> str:
    words = ("slurm", "submit", "reward", *tiny_recipe, "--profile", str(profile), f"output={output}", *settings)
    return cluster.rlhf(*words, expect=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["profile.partition=gpu"], "profile.partition = gpu: this cluster has main, small, spare, urgent"),
        (["profile.nodes=5"], "profile.nodes = 5: partition main has 4 nodes"),
        (["profile.partition=small", "profile.nodes=1", "profile.time='30'"], "time = 30: partition small allows 10:"),
        (["profile.device_kind=gpu", "profile.devices=4"], "devices = 4"),
        (["profile.constraint=ib"], "constraint = ib"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_with_the_key_of_the_profile(
    cluster, profile, tiny_recipe, tmp_path, settings, message
):
    assert message in refused(cluster, profile, tiny_recipe, tmp_path / "run", *settings)


def test_a_second_job_for_a_run_folder_is_refused_while_one_is_queued(cluster, jobs, profile, tiny_recipe, tmp_path):
    words = ("slurm", "submit", "reward", *tiny_recipe, "--profile", str(profile), f"output={tmp_path}/run")
    (number,) = jobs.numbers(cluster.rlhf(*words, "profile.sbatch_options=[--hold]"))
    assert f"job {number} for this run folder is PENDING" in refused(cluster, profile, tiny_recipe, tmp_path / "run")
    cluster.run("scancel", number)
    cluster.until(lambda: cluster.state(number) == "CANCELLED")


@pytest.mark.dist
def test_a_node_that_is_not_fit_ends_the_job_before_anything_starts(cluster, jobs, submit, tmp_path):
    number, output = submit(tmp_path / "run", "profile.free_disk_gib=1e6")
    cluster.wait(number, "FAILED", jobs.log(output, number))
    text = jobs.log(output, number).read_text()
    assert re.search(r"node2: not fit: .*/run has [\d.]+ GiB free, expected 1e\+06 \(free_disk_gib", text)
    assert "not started" in text and not (output / "metrics.jsonl").exists()


@pytest.mark.dist
def test_a_crash_ends_the_job_and_is_not_tried_again(cluster, jobs, submit, tmp_path):
    number, output = submit(tmp_path / "run", f"data.train={tmp_path}/gone.jsonl")
    cluster.wait(number, "FAILED", jobs.log(output, number))
    text = jobs.log(output, number).read_text()
    assert "gone.jsonl" in text and "failed with exit code 2" in text
    assert cluster.restarts(number) == 0


@pytest.mark.dist
@pytest.mark.slow
def test_the_script_without_a_launcher_trains_on_two_nodes(cluster, tiny_recipe, undisturbed, runs, tmp_path):
    environment = {"GLOO_SOCKET_IFNAME": "lo"}
    script = str(ROOT / "launch" / "scripts" / "sbatch.sh")
    options = (f"--output={tmp_path}/log", "--parsable")
    settings = (*tiny_recipe, *LONG, "train.publish=none", f"output={tmp_path}/run")
    said = cluster.run("sbatch", *options, script, *settings, **environment)
    cluster.wait(said.stdout.strip(), "COMPLETED", tmp_path / "log")
    runs.assert_close(runs.rows(tmp_path / "run"), runs.rows(undisturbed), 1e-5)
