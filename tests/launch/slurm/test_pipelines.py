"""A pipeline of two stages on a real SLURM: in one allocation, and as dependent jobs."""

import sys
from pathlib import Path

import pytest
import yaml

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
    """``submit(output, *settings)`` queues the pipeline; the numbers of its jobs."""

    def act(output: Path, *words: str) -> list[str]:
        common = ("--config", str(pipeline), "--profile", str(profile), f"output={output}")
        return jobs.numbers(cluster.rlhf("slurm", "submit", "pipeline", *common, *words))

    return act


@pytest.mark.full
def test_a_pipeline_in_one_allocation_paused_and_one_of_dependent_jobs_end_alike(cluster, jobs, submit, runs, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    (number,) = submit(one, "reward.train.epochs=5")
    log = jobs.log(one, number)
    cluster.until(lambda: jobs.steps(one / "reward") > 4, log)
    cluster.run("scancel", "--signal=USR1", "--full", number)
    cluster.wait_for_restart(number, 1, log)
    cluster.wait(number, "COMPLETED", log)
    text = log.read_text()
    assert "srun --nodes=2" in text and "saved and stopped on SIGUSR1" in text
    assert (one / "reward" / "done.json").is_file()

    first, second = submit(several, "reward.train.epochs=5", "--jobs", "dependent")
    assert cluster.state(second) == "PENDING"
    cluster.wait(first, "COMPLETED", jobs.log(several, first))
    assert not (several / "reward" / "done.json").exists()
    cluster.wait(second, "COMPLETED", jobs.log(several, second))
    for stage in ("sft", "reward"):
        assert runs.rows(several / stage) == runs.rows(one / stage)


def test_a_stage_that_fails_takes_those_behind_it_out_of_the_queue(cluster, jobs, submit, tmp_path):
    first, second = submit(tmp_path / "run", f"sft.data.train={tmp_path}/gone.jsonl", "--jobs", "dependent")
    cluster.wait(first, "FAILED", jobs.log(tmp_path / "run", first))
    assert "gone.jsonl" in jobs.log(tmp_path / "run", first).read_text()
    cluster.until(lambda: cluster.state(second) == "CANCELLED")
