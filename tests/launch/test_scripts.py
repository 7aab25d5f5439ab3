"""launch/scripts: the commands that they start, caught by stand-ins, are parsed by the parsers that would run them.

Runs of these scripts: tests/launch/test_hostfile.py (deepspeed over ssh), tests/launch/slurm/ (srun, sbatch).
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

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch" / "scripts").glob("*.sh"))
PROGRAMS = ("deepspeed", "torchrun", "srun", "ssh")
SCONTROL = """#!/bin/sh
case "$*" in *hostnames*) echo node1; echo node2;; *) echo "NodeName=node1 NodeAddr=10.0.0.1 X=y";; esac
"""


@pytest.fixture
def caught(tmp_path):
    """``caught(script, *arguments)`` runs a script; the words of every launcher that it started, by its name."""

    def act(script: Path, *arguments: str) -> dict[str, list[str]]:
        for program in PROGRAMS:
            stand_in = tmp_path / program
            catch = "exit 0" if program == "ssh" else f'printf "%s\\0" "$@" > {tmp_path}/{program}.words'
            stand_in.write_text(f"#!/bin/sh\n{catch}\n")
            stand_in.chmod(0o755)
        (tmp_path / "scontrol").write_text(SCONTROL)
        (tmp_path / "scontrol").chmod(0o755)
        (tmp_path / "hosts").write_text("# mine\nnode1 slots=2\nnode2 slots=2\n")
        slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-2]"}
        environment = os.environ | slurm | {"HOSTFILE": str(tmp_path / "hosts")}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([script, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
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
    "script", [*SCRIPTS, ROOT / "launch" / "slurm" / "step.sh", ROOT / ".ci" / "run"], ids=lambda path: path.name
)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck (.ci/run does)")
    done = subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
