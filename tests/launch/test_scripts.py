"""launch/scripts: the commands that they start, caught by stand-ins, are parsed by the parsers that would run them.

Runs of these scripts: tests/launch/jobs/test_hostfile.py (over ssh), tests/launch/slurm/ (srun, sbatch).
"""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reward.config import RewardConfig
from rlhf.config import parse_command_line
from tests.lacking import lacking

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "launch" / "containers"
SCRIPTS = sorted((ROOT / "launch" / "scripts").glob("*.sh"))
PROGRAMS = ("deepspeed", "torchrun", "srun")
SCONTROL = """\
case "$*" in
    *hostnames*) echo node1; echo node2;;
    requeue*) echo "$*";;
    *) echo "NodeName=node1 NodeAddr=10.0.0.1 X=y";;
esac
"""
SSH = """\
for last; do :; done
case "$last" in
    hostname*) echo 10.0.0.1;;
    *--stdin) read -r told; python -c 'import json, sys
command = json.loads(sys.argv[1])["options"]["command"]
open("{folder}/ssh.words", "w").write(chr(0).join([*command, ""]))' "$told";;
esac
"""
"""A host that says its address, and a supervisor that keeps the command that it is told."""


@pytest.fixture
def start(tmp_path):
    """``start(script, *arguments, name=shell, ...)`` runs a script; programs of these names do as told in shell."""

    def act(script: Path, *arguments: str, **programs: str) -> subprocess.CompletedProcess[str]:
        for program, text in programs.items():
            (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / program).chmod(0o755)
        (tmp_path / "hosts").write_text("# mine\nnode1 slots=2\nnode2 slots=2\n")
        slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-2]"}
        environment = os.environ | slurm | {"HOSTFILE": str(tmp_path / "hosts")}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        return subprocess.run([script, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)

    return act


@pytest.fixture
def caught(start, tmp_path):
    """``caught(script, *arguments)`` runs a script; the words of every launcher that it started, by its name."""

    def act(script: Path, *arguments: str) -> dict[str, list[str]]:
        catching = {program: f'printf "%s\\0" "$@" > {tmp_path}/{program}.words' for program in PROGRAMS}
        done = start(script, *arguments, **catching | {"ssh": SSH.format(folder=tmp_path), "scontrol": SCONTROL})
        assert done.returncode == 0, done.stderr
        return {path.stem: path.read_text().split("\0")[:-1] for path in tmp_path.glob("*.words")}

    return act


def stage_arguments(program: str, words: list[str]) -> list[str]:
    """What the stage is given, by the launcher's own parser where it has one in Python."""
    if program == "deepspeed":
        options = importlib.import_module("deepspeed.launcher.runner").parse_args(words)
        assert options.module
        script, arguments = options.user_script, options.user_args
    elif program == "torchrun":
        options = importlib.import_module("torch.distributed.run").get_args_parser().parse_args(words)
        assert options.module
        script, arguments = options.training_script, options.training_script_args
    else:
        place = words.index("-m")
        script, arguments = words[place + 1], words[place + 2 :]
        assert words[place - 1] == "python"
    assert script == "reward"
    return arguments


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_starts_the_quickstart_reward_run_and_passes_settings_on(script, caught):
    (found,) = caught(script, "train.epochs=2", "data.max_tokens=64").items()
    invocation = parse_command_line(RewardConfig, stage_arguments(*found), program="reward", description="")
    assert invocation.recipes == (Path("launch/recipes/quickstart_reward.yaml"),)
    assert (invocation.config.train.epochs, invocation.config.data.max_tokens) == (2, 64)


@pytest.mark.parametrize(
    ("signal", "code", "ends_with", "said"),
    [
        (False, 75, 75, ""),  # a STOP file, or train.max_minutes
        (True, 75, 0, "to the ranks: --signal=USR1 12\nrequeue 12\n"),
        (True, 1, 1, "to the ranks: --signal=USR1 12\n"),
        (True, 0, 0, "to the ranks: --signal=USR1 12\n"),
        (False, 0, 0, ""),
    ],
)
def test_a_batch_job_goes_back_into_the_queue_only_if_slurm_has_asked_it_to_stop(start, signal, code, ends_with, said):
    """SLURM signals the batch shell, the parent of srun."""
    ask = "kill -USR1 $PPID; sleep 0.5;" if signal else ""
    programs = {"srun": f"{ask} exit {code}", "scancel": 'echo "to the ranks: $*"', "scontrol": SCONTROL}
    done = start(ROOT / "launch" / "scripts" / "sbatch.sh", **programs)
    assert (done.returncode, done.stdout) == (ends_with, said), done.stderr


def test_slurm_signals_the_shell_of_the_batch_job_that_listens():
    text = (ROOT / "launch" / "scripts" / "sbatch.sh").read_text()
    assert "\n#SBATCH --signal=B:USR1@" in text and re.search(r"^trap '.*' USR1$", text, flags=re.MULTILINE)


def test_every_launcher_of_the_toolkit_has_a_script():
    used = {program for script in SCRIPTS for program in PROGRAMS if f"\n{program} " in script.read_text()}
    assert used == {"deepspeed", "torchrun", "srun"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_executable_valid_and_says_how_to_start_it(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    header = re.match(r"(#.*\n)+", script.read_text())[0]
    assert f"launch/scripts/{script.name}" in header


@pytest.mark.parametrize(
    "script",
    [*SCRIPTS, CONTAINERS / "install.sh", ROOT / ".ci" / "run"],
    ids=lambda path: path.name,
)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        lacking("no shellcheck: apt-get install shellcheck (.ci/run does)")
    done = subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_containers_have_the_same_base_and_the_whole_package():
    docker, apptainer = ((CONTAINERS / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    (base,) = re.findall(r"^ARG BASE=(\S+)$", docker, flags=re.MULTILINE)
    assert f"\n    base={base}\n" in apptainer
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {*re.findall(r"^    (\S+) /opt/margin-rlhf/\S+$", apptainer, flags=re.MULTILINE)}
    assert sent == copied >= {"rlhf", "reward", "policy", "launch", "ds_configs", "setup.cfg", "constraints.txt"}
    assert all((ROOT / name).exists() for name in sent)
