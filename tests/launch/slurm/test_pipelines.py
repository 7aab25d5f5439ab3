"""A pipeline of two stages on a real SLURM: in one allocation, and as dependent jobs."""

import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.killed_pipeline import weights
from launch.jobs.hostfile import read_hostfile
from tests.slurm import PROGRAMS

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tiny_recipe, tiny_model, tiny_pairs) -> Path:
    """SFT, then a reward model from what it publishes."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "sft.yaml").write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}}}\n"
        f"data: {{train: {tiny_pairs}, columns: {{completion: chosen}}, eval_share: 0.2, cache_dir: {folder}/cache}}\n"
        "train: {global_batch_size: 12, micro_batch_tokens: 300, max_steps: 4, evaluate_every: 0}\n"
        "engine: {deepspeed: zero3}\n"
    )
    stages = {
        "sft": {"recipe": str(folder / "sft.yaml")},
        "reward": {"recipe": tiny_recipe[1], "set": {"model": {"path": "${stages.sft.final}"}}},
    }
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "unset"), "stages": stages}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def profile(tmp_path_factory, profile) -> Path:
    """A profile with the command rlhf of this checkout in front of PATH, installed or not."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "rlhf").write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.cli "$@"\n')
    (folder / "rlhf").chmod(0o755)
    path = folder / "profile.yaml"
    path.write_text(profile.read_text() + f"setup: ['export PATH={folder}:$PATH']\n")
    return path


@pytest.fixture
def submit(cluster, jobs, profile, pipeline):
    """``submit(output, *settings, recipe=...)`` queues the pipeline; the numbers of its jobs."""

    def act(output: Path, *words: str, recipe: Path = pipeline) -> list[str]:
        common = ("--config", str(recipe), "--profile", str(profile), f"output={output}")
        return jobs.numbers(cluster.rlhf("slurm", "submit", "pipeline", *common, *words))

    return act


@pytest.mark.full
def test_a_pipeline_in_one_allocation_with_everything_against_it_publishes_what_dependent_jobs_do(
    cluster, jobs, submit, runs, tmp_path
):
    """benchmarks/disturbances.py does it in all stages, several times, at random moments."""
    one, several = tmp_path / "one", tmp_path / "several"
    settings = ("reward.train.epochs=15", "reward.train.checkpoint_every=10")
    patience = ("profile.probe_seconds=15", "profile.srun_options=[--wait=15]")
    (number,) = submit(one, *settings, *patience, "profile.partition=spare")
    log = jobs.log(one, number)

    def pause() -> None:
        cluster.run("scancel", "--signal=USR1", "--full", number)

    def preempt() -> None:
        cluster.run("sbatch", "-p", "urgent", "-N4", "--output=/dev/null", "--wrap", "sleep 1")

    def lose_a_node() -> None:
        node = [*read_hostfile(one / "slurm" / f"hostfile-{number}")][-1]
        cluster.kill_node(node)
        cluster.declare_lost(node)
        cluster.mend_node(node)

    for restart, disturb in enumerate((pause, preempt, lose_a_node), start=1):
        seen = jobs.steps(one / "reward")
        cluster.until(lambda seen=seen: jobs.steps(one / "reward") > seen + 4, log)
        disturb()
        cluster.wait_for_restart(number, restart, log)
    cluster.wait(number, "COMPLETED", log)
    text = log.read_text()
    assert "srun --nodes=2" in text and "saved and stopped on SIGUSR1" in text
    assert "saved and stopped on SIGTERM" in text and "DUE TO NODE FAILURE" in text

    first, second = submit(several, *settings, "--jobs", "dependent")
    assert cluster.state(second) == "PENDING"
    cluster.wait(first, "COMPLETED", jobs.log(several, first))
    assert not (several / "reward" / "done.json").exists()
    cluster.wait(second, "COMPLETED", jobs.log(several, second))
    for stage in ("sft", "reward"):
        assert runs.rows(several / stage) == runs.rows(one / stage)
    assert len(weights(several)) == 2 and weights(one) == weights(several)


def test_a_stage_that_fails_takes_those_behind_it_out_of_the_queue(cluster, jobs, submit, tmp_path):
    first, second = submit(tmp_path / "run", f"sft.data.train={tmp_path}/gone.jsonl", "--jobs", "dependent")
    cluster.wait(first, "FAILED", jobs.log(tmp_path / "run", first))
    assert "gone.jsonl" in jobs.log(tmp_path / "run", first).read_text()
    cluster.until(lambda: cluster.state(second) == "CANCELLED")


@pytest.mark.full
def test_stages_that_do_not_need_each_other_run_side_by_side_in_jobs_and_in_one_and_publish_what_they_do_one_by_one(
    cluster, jobs, submit, pipeline, tmp_path
):
    """Two SFT runs of one node each, and the reward model from the first."""
    tree = yaml.safe_load(pipeline.read_text())
    sft, reward = tree["stages"]["sft"], tree["stages"]["reward"]
    stages = {"sft": sft | {"nodes": 1}, "other": sft | {"kind": "sft", "nodes": 1, "set": {"train": {"seed": 5}}}}
    pipeline = pipeline.with_name("three.yaml")
    pipeline.write_text(yaml.safe_dump(tree | {"stages": stages | {"reward": reward}}, sort_keys=False))
    outputs = [tmp_path / name for name in ("jobs", "one", "after")]
    more = ("sft.train.max_steps=30", "other.train.max_steps=30")

    numbers = submit(outputs[0], *more, "--jobs", "dependent", recipe=pipeline)
    together = lambda: [cluster.state(number) for number in numbers] == ["RUNNING", "RUNNING", "PENDING"]  # noqa: E731
    cluster.until(together, jobs.log(outputs[0], numbers[0]))
    for number in numbers:
        cluster.wait(number, "COMPLETED", jobs.log(outputs[0], number))
    for output, words in ((outputs[1], ()), (outputs[2], ("--parallel", "1"))):
        (number,) = submit(output, *more, *words, recipe=pipeline)
        cluster.wait(number, "COMPLETED", jobs.log(output, number))
    one, after = (jobs.log(output, "*").parent for output in outputs[1:])
    said = ["".join(path.read_text() for path in folder.glob("*.log")) for folder in (one, after)]
    assert said[0].index("other: running") < said[0].index("sft: finished")
    assert said[1].index("sft: finished") < said[1].index("other: running")
    assert len(weights(outputs[0])) == 3 and weights(outputs[0]) == weights(outputs[1]) == weights(outputs[2])


@pytest.mark.full
def test_a_pipeline_inside_of_a_container_without_slurm_runs_on_both_nodes_and_goes_on_after_a_pause(
    cluster, jobs, submit, profile, tmp_path
):
    """The stand-in of a container has the programs of this machine but for SLURM's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for path in [*Path("/usr/bin").iterdir(), *Path("/usr/sbin").iterdir()]:
        if path.name not in PROGRAMS and not (programs / path.name).exists():
            (programs / path.name).symlink_to(path)
    container = tmp_path / "container"
    container.write_text(f'#!/bin/sh\nPATH={Path(sys.executable).parent}:{programs}\nexport PATH\nexec "$@"\n')
    container.chmod(0o755)
    output = tmp_path / "run"
    settings = ("reward.train.epochs=15", "reward.train.checkpoint_every=10", f"profile.container=[{container}]")
    (number,) = submit(output, *settings)
    log = jobs.log(output, number)
    cluster.until(lambda: jobs.steps(output / "reward") > 4, log)
    cluster.run("scancel", "--signal=USR1", "--full", number)
    cluster.wait_for_restart(number, 1, log)
    cluster.wait(number, "COMPLETED", log)
    assert "saved and stopped on SIGUSR1" in log.read_text() and "launch.jobs.asked_step" in log.read_text()
    said = (output / "logs" / "reward" / "rank0.log").read_text()
    assert "2 rank(s)" in said and said.count("resuming from") == 1
    assert (output / "logs" / "reward" / "rank1.log").exists() and len(weights(output)) == 2
