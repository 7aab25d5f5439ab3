"""What is checked before a job is submitted, and how jobs wait for each other. SLURM's commands are stand-ins."""

import shlex
import subprocess
from pathlib import Path

import pytest

from launch.cli import main
from launch.slurm.profile import ClusterProfile
from launch.slurm.submit import check_cluster
from rlhf.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
PIPELINE = ["pipeline", "--config", "launch/recipes/pipeline.yaml", "--profile", "launch/clusters/example.yaml"]
SINFO = "gpu 6 1-00:00:00\ngpu 2 1-00:00:00\ngpu_long 2 infinite\nsmall 1 10:00\n"
SQUEUE = """#!/bin/sh
case "$*" in
    *"--jobs 7") echo "PENDING|2|0:00|Resources" ;;
    *) echo "error: Invalid job id specified" >&2; exit 1 ;;
esac
"""
SBATCH = """#!/bin/sh
echo "$@" >> {folder}/submitted
echo $((100 + $(wc -l < {folder}/submitted)))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder in front of PATH with the commands of a SLURM; what sbatch was given is in the file ``submitted``."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "answer").write_text(SINFO)
    (folder / "submitted").touch()
    (folder / "sinfo").write_text(f"#!/bin/sh\ncat {folder}/answer\n")
    (folder / "squeue").write_text(SQUEUE)
    (folder / "sbatch").write_text(SBATCH.format(folder=folder))
    for command in ("sinfo", "squeue", "sbatch"):
        (folder / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(ROOT)
    return folder


def submitted(slurm: Path) -> list[str]:
    return (slurm / "submitted").read_text().splitlines()


# ---- partitions


@pytest.mark.parametrize(
    ("partition", "nodes", "time"),
    [("gpu", 8, "24:00:00"), ("gpu,gpu_long", 4, "20:00:00"), ("gpu,gpu_long", 2, "48:00:00"), (None, 8, "48:00:00")],
)
def test_a_job_that_fits_into_one_of_its_partitions_is_taken(slurm, partition, nodes, time):
    check_cluster(ClusterProfile(partition=partition, nodes=nodes, time=time))


@pytest.mark.parametrize(
    ("partition", "nodes", "time", "message"),
    [
        ("cpu", 1, "60", "profile.partition = cpu: this cluster has gpu, gpu_long, small"),
        ("gpu,gpu_lng", 1, "60", "profile.partition = gpu,gpu_lng: this cluster has gpu, gpu_long, small, not gpu_lng"),
        ("gpu", 9, "60", "profile.nodes = 9: partition gpu has 8 nodes"),
        (
            "gpu,gpu_long",
            4,
            "48:00:00",
            "profile.time = 48:00:00: partition gpu allows 1-00:00:00; "
            "profile.nodes = 4: partition gpu_long has 2 nodes",
        ),
    ],
)
def test_a_job_that_fits_into_none_of_its_partitions_is_refused_with_every_reason(
    slurm, partition, nodes, time, message
):
    with pytest.raises(ConfigError) as caught:
        check_cluster(ClusterProfile(partition=partition, nodes=nodes, time=time))
    assert str(caught.value) == message


# ---- jobs of a pipeline


def test_nothing_is_submitted_while_a_job_of_any_stage_is_queued(slurm, tmp_path, capsys):
    """The queued job is that of the last stage alone, or of the whole pipeline as one job."""
    for label in ("ppo", "job"):
        numbers = tmp_path / label / "slurm"
        numbers.mkdir(parents=True)
        (numbers / "sft.id").write_text("6\n")
        (numbers / f"{label}.id").write_text("7\n")
        words = [*PIPELINE, "--jobs", "dependent", f"output={tmp_path}/{label}", "profile.time='60'"]
        assert main(["slurm", "submit", *words]) == 2
        assert f"{tmp_path}/{label}: job 7 for this run folder is PENDING" in capsys.readouterr().err
        assert submitted(slurm) == []


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ("auto", {"sft": "", "reward": "afterok:101", "preference": "afterok:101", "ppo": "afterok:102:103"}),
        ("2", {"preference": "afterok:101,afterany:101", "ppo": "afterok:102:103,afterany:102"}),
        ("1", {"reward": "afterok:101,afterany:101", "preference": "afterok:101,afterany:102"}),
    ],
)
def test_stages_wait_for_those_that_they_need_and_for_no_others_unless_so_many_would_run(
    slurm, tmp_path, parallel, expected
):
    words = [*PIPELINE, "--jobs", "dependent", f"output={tmp_path}/run", "--parallel", parallel]
    assert main(["slurm", "submit", *words]) == 0
    waits = {line.rpartition("/")[2].removesuffix(".sh"): line for line in submitted(slurm)}
    for name, dependency in expected.items():
        words = f"--dependency={dependency} --kill-on-invalid-dep=yes " if dependency else ""
        assert waits[name] == f"--parsable {words}{tmp_path}/run/slurm/{name}.sh"


def test_one_job_for_all_hands_on_how_many_stages_run_at_a_time(slurm, tmp_path, capsys):
    assert main(["slurm", "render", *PIPELINE, "--parallel", "2"]) == 0
    said = capsys.readouterr().out
    assert "--parallel 2" in said.partition("start() {")[2] and "--parallel 2" in said.partition("Written by")[2]
    stage = ["reward", "--config", "launch/recipes/reward_smollm2.yaml", *PIPELINE[3:]]
    for words, message in (([*stage, "--parallel", "2"], "leave --parallel out"),):
        assert main(["slurm", "render", *words]) == 2
        assert message in capsys.readouterr().err
    for odd in ("0", "many", "-1", "1.5"):
        with pytest.raises(SystemExit):
            main(["slurm", "render", *PIPELINE, f"--parallel={odd}"])
        assert f"--parallel: {odd}: expected auto or a whole number above 0" in capsys.readouterr().err


RECIPE = """\
output: {folder}/run
stages:
  backbone: {{kind: import, set: {{source: smollm2}}}}
  reward:
    recipe: {root}/launch/recipes/reward_smollm2.yaml
    nodes: 2
    ranks: 3
    time: "2:00:00"
    set: {{model: {{path: "${{stages.backbone.final}}"}}}}
  again:
    kind: reward
    recipe: {root}/launch/recipes/reward_smollm2.yaml
"""


def test_the_job_of_a_stage_asks_for_what_the_stage_says_and_an_import_for_one_node_without_gpus(slurm, tmp_path):
    recipe, folder = tmp_path / "mine.yaml", tmp_path / "run" / "slurm"
    recipe.write_text(RECIPE.format(folder=tmp_path, root=ROOT))
    words = ["pipeline", "--config", str(recipe), "--profile", "launch/clusters/example.yaml", "profile.nodes=4"]
    assert main(["slurm", "submit", *words, "--jobs", "dependent"]) == 0
    shapes = {}
    for name in ("backbone", "reward", "again"):
        lines = (folder / f"{name}.sh").read_text().splitlines()
        asked = dict(
            line.removeprefix("#SBATCH --").split("=", 1)
            for line in lines
            if line.startswith("#SBATCH --") and "=" in line
        )
        shapes[name] = [asked["nodes"], asked.get("gpus-per-node"), asked["time"]]
    assert shapes == {
        "backbone": ["1", None, "24:00:00"],
        "reward": ["2", "h100:3", "2:00:00"],
        "again": ["4", "h100:8", "24:00:00"],
    }
    assert f"hostfiles=({tmp_path}/run/logs/again/hostfile)" in (folder / "again.sh").read_text()
    (folder / "reward.sh").unlink()
    assert main(["slurm", "render", *words, "--jobs", "dependent", "profile.signal_lead_seconds=7200"]) == 2


def test_one_job_for_all_says_that_times_of_stages_are_not_its_own(slurm, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path, root=ROOT))
    words = ["pipeline", "--config", str(recipe), "--profile", "launch/clusters/example.yaml"]
    for jobs, said in (
        ("one", "note: time of reward is that of jobs of their own (--jobs dependent)"),
        ("dependent", ""),
    ):
        assert main(["slurm", "render", *words, "--jobs", jobs]) == 0
        error = capsys.readouterr().err
        assert error.startswith(said) and error.count("\n") == (1 if said else 0)


def test_one_job_for_all_must_have_what_each_stage_asks_for(slurm, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path, root=ROOT))
    words = ["pipeline", "--config", str(recipe), "--profile", "launch/clusters/example.yaml", "profile.nodes=1"]
    assert main(["slurm", "submit", *words]) == 2
    assert "stages.reward.nodes = 2: the run has 1" in capsys.readouterr().err
    assert submitted(slurm) == []


@pytest.mark.parametrize("jobs", ["one", "dependent"])
def test_a_sweep_is_submitted_as_a_pipeline_is(slurm, tmp_path, capsys, jobs):
    folder = tmp_path / "sweep"
    recipe = ["reward", "--config", "launch/recipes/reward_smollm2.yaml", "--profile", "launch/clusters/example.yaml"]
    words = [*recipe, "--sweep", str(folder), "margin.kind=none,ot", "train.seed=0,1", "--jobs", jobs]
    assert main(["slurm", "submit", *words]) == 0
    assert len(submitted(slurm)) == (1 if jobs == "one" else 4)
    scripts = [path.read_text().replace(" \\\n        ", " ") for path in sorted((folder / "slurm").glob("*.sh"))]
    command = f"rlhf sweep reward --output {folder} --config launch/recipes/reward_smollm2.yaml margin.kind=none,ot"
    assert all(command in text for text in scripts)
    assert all(("--only" in text) == (jobs == "dependent") for text in scripts)
    assert main(["slurm", "submit", "pipeline", *recipe[1:], "--sweep", str(folder)]) == 2
    assert "a sweep is of one stage" in capsys.readouterr().err


def test_written_scripts_come_with_commands_that_submit_them_as_submit_does(slurm, tmp_path, capsys):
    words = [*PIPELINE, "--jobs", "dependent", f"output={tmp_path}/my run"]
    assert main(["slurm", "submit", *words]) == 0
    expected = submitted(slurm)
    (slurm / "submitted").write_text("")
    capsys.readouterr()
    assert main(["slurm", "render", *words, "--write"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = "\n".join(lines[lines.index("submit with:") + 1 :])
    subprocess.run(["bash", "-euc", commands], check=True)
    assert len(expected) == 5 and submitted(slurm) == expected


def test_the_command_in_the_header_of_a_script_makes_room_for_its_log(slurm, tmp_path, capsys):
    recipe = ["reward", "--config", "launch/recipes/reward_llama3_8b.yaml", "--profile", "launch/clusters/example.yaml"]
    assert main(["slurm", "render", *recipe, f"output={tmp_path}/my run"]) == 0
    text = capsys.readouterr().out
    (command,) = [line for line in text.splitlines() if line.startswith("# Submit with: ")]
    subprocess.run(["bash", "-euc", command.removeprefix("# Submit with: ")], check=True)
    assert submitted(slurm) == [f"{tmp_path}/my run/slurm/job.sh"]
    (log,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
    assert Path(shlex.split(log)[-1].removeprefix("--output=")).parent.is_dir()
