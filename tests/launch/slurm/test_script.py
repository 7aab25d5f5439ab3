"""Cluster profiles and the scripts that become of them, without a SLURM."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from launch.cli import main
from launch.jobs.srun import srun_command
from launch.slurm import bad_gpu, script
from launch.slurm.profile import ClusterProfile, load_profile
from launch.slurm.script import Job, render
from rlhf.core.errors import ConfigError
from rlhf.train import status as statuses
from rlhf.train.status import new_status
from tests.lacking import lacking

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "launch" / "clusters" / "example.yaml"


def refusal(tmp_path: Path, **settings) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError) as caught:
        load_profile([path], [])
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"node": 2}, "did you mean nodes?"),
        ({"nodes": 0}, "nodes = 0"),
        ({"time": "tomorrow"}, "time = tomorrow: expected"),
        ({"time": "00:05:00"}, "signal_lead_seconds = 300 leaves nothing of time = 00:05:00 (300 s)"),
        ({"container": ["apptainer", "exec", "x.sif"], "venv": ".venv"}, "venv and container exclude each other"),
        ({"sbatch_options": ["exclusive"]}, "'exclusive' is no option"),
        ({"environment": {"A-B": "1"}}, "environment.A-B"),
        ({"device_kind": "tpu"}, "device_kind"),
        ({"environment": {"OMP_NUM_THREADS": 8}}, "put it in quotes"),
    ],
)
def test_a_profile_that_describes_no_job_is_refused_with_the_key(tmp_path, settings, message):
    assert message in refusal(tmp_path, **settings)


def test_a_time_that_yaml_reads_as_a_number_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("time: 24:00:00\n")  # 86400 in YAML 1.1
    with pytest.raises(ConfigError, match=r"'24:00:00' in quotes"):
        load_profile([path], [])


@pytest.mark.parametrize("text", ["12:00:00", "90", "1-00:00:00"])
def test_a_time_on_the_command_line_needs_no_quotes(text):
    assert load_profile([EXAMPLE], [f"time={text}"]).time == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("2:00:05", 7205), ("1-0", 86400), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert ClusterProfile(time=text).time_seconds == seconds


def job(**changes) -> Job:
    words = ("reward", "--config", "a recipe.yaml", "data.train=it's.jsonl")
    return Job(**{"name": "r", "title": "reward", "output": Path("runs/my run"), "arguments": words} | changes)


PROFILES = [
    {"nodes": nodes, "device_kind": kind, "requeue": requeue, **more}
    for nodes, kind, requeue, more in itertools.product(
        [1, 3],
        ["gpu", "cpu"],
        [True, False],
        [
            {},
            {
                "modules": ("cuda/12.8",),
                "environment": {"A": "it's 5 $ a\nline"},
                "interface": "ib0",
                "setup": ("ulimit -l unlimited",),
                "srun_options": ("--container-image=/a b.sqsh",),
                "container": ("apptainer", "exec", "--bind", "/a b", "x.sif"),
            },
        ],
    )
]


@pytest.mark.parametrize("settings", PROFILES, ids=lambda each: "-".join(map(str, each.values()))[:20])
def test_every_script_is_valid_shell(settings, tmp_path):
    profile = ClusterProfile(**settings)
    for kind in [{}, {"pipeline": True, "arguments": ("rlhf", "pipeline", "run", "p.yaml")}]:
        path = tmp_path / "job.sh"
        path.write_text(render(job(**kind), profile))
        subprocess.run(["bash", "-n", path], check=True)
        if shutil.which("shellcheck") is None:
            lacking("no shellcheck: apt-get install shellcheck (.ci/run does)")
        # SC2016: the step is meant to expand on the node. SC1090/SC2034: lines of the profile.
        done = subprocess.run(["shellcheck", "--exclude=SC2016", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["it's mine", 'a "quoted" $(touch gone)', "tab\\and `date`", "-rf *"])
def test_a_run_folder_of_any_name_stays_one_word(tmp_path, name):
    """As a line for sbatch, and in the shell."""
    entries = (SimpleNamespace(name="sft", output=tmp_path / name / "sft", ranks=None),)
    text = render(job(output=tmp_path / name, stages=entries, pipeline=True), ClusterProfile())
    (output,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
    assert shlex.split(output.removeprefix("#SBATCH ")) == [f"--output={tmp_path}/{name}/slurm/logs/%j.log"]
    lines = [line for line in text.splitlines() if line.startswith(("run=", "statuses=", "hostfiles="))]
    shown = "printf '%s\\0' \"$run\" \"${statuses[@]}\" \"${hostfiles[@]}\""
    done = subprocess.run(["bash", "-c", "\n".join([*lines, shown])], capture_output=True, text=True, cwd=tmp_path)
    folder = f"{tmp_path}/{name}"
    assert done.stdout.split("\0")[:-1] == [folder, f"{folder}/sft/status.json", f"{folder}/logs/sft/hostfile"]
    assert not (tmp_path / "gone").exists()


def test_directives_say_what_the_profile_says():
    text = render(job(), load_profile([EXAMPLE], []))
    found = re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE)
    expected = {
        "--partition=gpu",
        "--account=my-project",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=h100:8",
        "--cpus-per-task=96",
        "--mem=0",
        "--time=24:00:00",
        "--signal=B:USR1@600",
        "--requeue",
        "--open-mode=append",
        f'--output="{Path.cwd()}/runs/my run/slurm/logs/%j.log"',
    }
    assert expected <= {*found}
    assert not [line for line in found if "qos" in line], "what is left out is not asked for"


def test_which_node_it_is_only_the_node_says():
    """In the batch shell all would claim to be node 0."""
    text = render(job(), ClusterProfile(nodes=2, devices=4))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in lines if "SLURM_NODEID" in line]
    assert "python -m launch.jobs.supervisor --slots 4x2 --node slurm -- python -m reward" in joined(text)


def joined(text: str) -> str:
    """The script with its broken lines made whole."""
    return re.sub(r"\s*\\\n\s*", " ", text)


@pytest.mark.parametrize(
    ("hosts", "slots"), [({"n1": 4, "n2": 4}, "4x2"), ({"n1": 4, "n2": 1}, "4,1"), ({"n1": 2}, "2x1")]
)
def test_srun_starts_a_supervisor_on_each_node_with_what_each_has_and_the_words_unchanged(monkeypatch, hosts, slots):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    words = [sys.executable, "-m", "policy.sft", "--config", "a recipe.yaml", "data.train=it's $HOME.jsonl"]
    command = srun_command(words, hosts=hosts, port=29511, there=hosts)
    assert command[:4] == ["srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1"]
    assert f"--nodelist={','.join(hosts)}" in command  # not whichever nodes of the allocation are free
    options = ["--slots", slots, "--node", "slurm", "--address", "n1", "--port", "29511", "--"]
    assert command[-len(options) - len(words) :] == [*options, *words]
    monkeypatch.setenv("MASTER_ADDR", "10.1.1.1")
    assert "10.1.1.1" in srun_command(words, hosts=hosts, port=29511, there=hosts)


def test_a_container_wraps_the_supervisor_and_its_python_is_used(tmp_path):
    text = render(job(), ClusterProfile(container=("apptainer", "exec", "x.sif")))
    assert "apptainer exec x.sif python -m launch.jobs.supervisor --slots 8x1" in joined(text)
    assert "apptainer exec x.sif python -m launch.slurm.preflight" in joined(text)
    assert sys.prefix not in text


def test_a_pipeline_is_started_inside_of_the_container_and_its_steps_outside(monkeypatch):
    profile = ClusterProfile(container=("apptainer", "exec", "--bind", "/a b", "x.sif"), nodes=2)
    text = render(job(pipeline=True, arguments=("rlhf", "pipeline", "run", "p.yaml")), profile)
    inside = "apptainer exec --bind '/a b' x.sif"
    assert f"{inside} python -m launch.cli pipeline run p.yaml" in joined(text).partition("start() {")[2]
    (line,) = [line for line in text.splitlines() if line.startswith("export RLHF_STEPS=")]
    told = subprocess.run(["bash", "-c", f"{line}; printenv RLHF_CONTAINER"], capture_output=True, text=True).stdout
    monkeypatch.setenv("RLHF_STEPS", "/steps")
    monkeypatch.setenv("RLHF_CONTAINER", told.strip())
    words = srun_command(["python", "-m", "reward"], hosts={"n1": 2, "n2": 2}, port=1, there={"n1": 2, "n2": 2})
    assert words[:5] == [sys.executable, "-m", "launch.jobs.asked_step", "/steps", "--"]
    step = words[5:]
    assert step[0] == "srun" and step[step.index("apptainer") :][:5] == shlex.split(inside)
    supervisor = [sys.executable, "-m", "launch.jobs.supervisor", "--slots", "2x2", "--node", "slurm"]
    assert step[step.index("x.sif") + 1 :][: len(supervisor)] == supervisor


SERVING = """
trap : USR1 TERM
{functions}
"$@" &
pid=$!
while kill -0 "$pid" 2> /dev/null; do serve_steps 2> /dev/null; sleep 0.1; done
wait "$pid"
"""


@pytest.fixture
def serve(tmp_path):
    """``serve(command)``: a process that asks for a step with that command, and the job script's shell around it."""
    profile = ClusterProfile(container=("apptainer", "exec", "x.sif"))
    text = render(job(pipeline=True, arguments=("rlhf", "pipeline", "run", "p.yaml")), profile)
    shell = SERVING.format(functions=functions_of(text, "run_step", "serve_steps"))

    def start(*command: str) -> psutil.Popen:
        steps = tmp_path / "steps"
        steps.mkdir()
        environment = os.environ | {"RLHF_STEPS": str(steps), "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "launch.jobs.asked_step", str(steps), "--", *command]
        with (tmp_path / "its log").open("w") as log:
            return psutil.Popen(["bash", "-c", shell, "-", *words], env=environment, cwd=tmp_path, stdout=log)

    return start


@pytest.mark.parametrize("code", [0, 75, 7])
def test_a_step_that_is_asked_for_runs_outside_in_the_same_folder_and_gives_back_its_code(serve, tmp_path, code):
    process = serve("bash", "-c", 'echo "$2 $3 in $PWD"; exit "$1"', "-", str(code), "--", "it's $HOME\nand more")
    assert process.wait(60) == code
    assert (tmp_path / "its log").read_text() == f"-- it's $HOME\nand more in {tmp_path}\n"


def test_a_step_is_ended_with_whoever_asked_for_it(serve, tmp_path):
    process = serve("bash", "-c", "echo $$ > pid; exec sleep 60")
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    step = psutil.Process(int((tmp_path / "pid").read_text()))
    (client,) = [each for each in process.children() if each.cmdline()[:1] == [sys.executable]]
    client.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not step.is_running() or step.status() == psutil.STATUS_ZOMBIE


def test_render_prints_a_script_for_a_shipped_recipe_with_changes_to_recipe_and_profile(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["slurm", "render", "reward", "--config", "launch/recipes/reward_llama3_8b.yaml", "--profile", str(EXAMPLE)]
    assert main([*words, "output=runs/x", "profile.nodes=4"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=4" in text and "srun --nodes=4 --ntasks=4" in text
    (line,) = [line for line in text.splitlines() if line.startswith("# Written by: ")]
    assert main(shlex.split(line.removeprefix("# Written by: rlhf "))) == 0
    assert capsys.readouterr().out == text, "the command in a script's header writes that script"


def test_render_writes_the_script_where_submit_would_and_says_how_to_submit_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = ["slurm", "render", "reward", "--config", "launch/recipes/reward_llama3_8b.yaml", "--profile", str(EXAMPLE)]
    words.append(f"output={tmp_path}/run")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main([*words, "--write"]) == 0
    path = tmp_path / "run" / "slurm" / "job.sh"
    assert path.read_text() == printed and path.stat().st_mode & 0o111
    assert (path.parent / "logs").is_dir()
    assert capsys.readouterr().out == f"written: {path}\nsubmit with:\n  sbatch {path}\n"


def test_several_printed_scripts_are_told_apart_by_their_paths(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = ["slurm", "render", "pipeline", "--config", "launch/recipes/pipeline.yaml", "--profile", str(EXAMPLE)]
    assert main([*words, "--jobs", "dependent", f"output={tmp_path}/run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("# =====")]
    assert [lines[number + 1] for number in heads] == ["#!/bin/bash"] * len(heads)
    assert f"{tmp_path}/run/slurm/sft.sh (1 of {len(heads)}; --write writes all of them)" in lines[heads[0]]
    assert f"{tmp_path}/run/slurm/reward.sh (2 of {len(heads)}" in lines[heads[1]]


def test_a_script_that_was_submitted_from_elsewhere_makes_its_folder_and_a_copy_of_itself_in_it(tmp_path):
    for name, text in {"scontrol": "echo NodeAddr=n1", "srun": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    mine = tmp_path / "mine.sh"
    mine.write_text(render(job(output=tmp_path / "my run"), ClusterProfile(requeue=False)))
    job_variables = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | job_variables
    done = subprocess.run(["bash", mine], env=environment, capture_output=True, text=True)
    assert "not started: a node is not fit" in done.stdout and done.stderr == ""
    here = tmp_path / "my run" / "slurm"
    assert (here / "hostfile-12").read_text() == "NodeAddr=n1 slots=8\n"
    assert (here / "job.sh").read_text() == mine.read_text()


def functions_of(text: str, *names: str) -> str:
    """The functions of a script by these names."""
    found = [
        re.search(rf"^{name}\(\) \{{([^\n]*\}}$|\n.*?^\}}$)", text, flags=re.MULTILINE | re.DOTALL) for name in names
    ]
    return "\n".join(each[0] for each in found)


def write_status(folder: Path, step: int, state: str = "stopped") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = '{{\n  "evaluation": {{\n    "step": 77\n  }},\n  "state": "{}",\n  "step": {},\n  "unit": "step"\n}}\n'
    (folder / "status.json").write_text(text.format(state, step))


def test_a_start_has_made_progress_if_its_stages_came_further_wherever_their_folders_are(tmp_path):
    elsewhere = tmp_path / "scratch disk" / "ppo"
    stages = (tmp_path / "run" / "sft", elsewhere)
    entries = tuple(SimpleNamespace(name=folder.name, output=folder, ranks=None) for folder in stages)
    text = render(job(output=tmp_path / "run", stages=entries), ClusterProfile(requeue=True))
    (statuses,) = [line for line in text.splitlines() if line.startswith("statuses=")]
    check = f"here={tmp_path}\n{statuses}\n{functions_of(text, 'steps', 'came_further')}\ncame_further"

    def came_further() -> bool:
        return subprocess.run(["bash", "-c", check], env={"SLURM_JOB_ID": "5", "PATH": "/usr/bin:/bin"}).returncode == 0

    assert not came_further(), "nothing is there"
    write_status(stages[0], 9)
    assert came_further() and not came_further()
    write_status(stages[0], 0)
    assert not came_further(), "a start that was only begun"
    write_status(stages[0], 9, "finished")
    assert came_further(), "a stage that is finished"
    write_status(elsewhere, 3)
    assert came_further() and not came_further()


def test_a_line_break_in_a_setting_is_neither_code_nor_the_end_of_what_sbatch_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = "x\ntouch gone\n#"
    arguments = ("reward", f"data.system={hostile}", "it's\t$(touch gone)")
    settings = {"environment": {"A": hostile}, "requeue": False}
    text = render(
        job(title=f"reward in {hostile}", arguments=arguments, written_by=f"rlhf {hostile}"), ClusterProfile(**settings)
    )
    lines = text.splitlines()
    assert not [line for line in lines if line.startswith("touch gone")]
    assert next(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("")
    start = functions_of(text, "start").replace("srun", "printf '%s|' srun", 1)
    done = subprocess.run(["bash", "-c", f"{start}\nstart"], capture_output=True, text=True, check=True)
    assert done.stdout.split("|")[-4:-1] == ["reward", *arguments[1:]]
    for name in ("partition", "account", "constraint"):
        with pytest.raises(ConfigError, match=f"sbatch --{name}=.*: expected one line"):
            render(job(), ClusterProfile(**{name: hostile}))
    with pytest.raises(ConfigError, match="sbatch --job-name"):
        render(job(name=hostile), ClusterProfile())


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"environment": {"HF_HOME": "$HOME/hf"}}, "environment.HF_HOME"), ({"venv": "${HOME}/venv"}, "venv")],
)
def test_what_would_stay_literal_is_refused_with_the_way_out(settings, name):
    with pytest.raises(ValueError, match=rf"{re.escape(name)} = .*nothing is expanded.*oc\.env:HOME"):
        ClusterProfile(**settings | {"venv": Path(settings["venv"])} if "venv" in settings else settings)


def test_a_script_with_values_is_for_its_owner_alone_and_secrets_come_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "write_snapshot", lambda folder: None)
    secrets = tmp_path / "my secrets.env"
    secrets.write_text("HF_TOKEN='hf x'\n")
    mine = job(output=tmp_path / "run")
    script.write_script(mine, ClusterProfile(environment={"HF_TOKEN": "hf x"}))
    assert mine.script.stat().st_mode & 0o077 == 0
    script.write_script(mine, ClusterProfile(environment_files=(secrets,)))
    text = mine.script.read_text()
    assert "hf x" not in text and mine.script.stat().st_mode & 0o055
    begin, end = text.index("[ -r "), text.index("set +a")
    assert runs_to("echo $HF_TOKEN; env | grep -c HF_TOKEN", text[begin:end]) == "hf x\n1\n"
    secrets.unlink()
    assert runs_to("echo on", text[begin:end]) == f"not started: cannot read {secrets}\n"


def test_a_missing_module_ends_the_job_before_it_trains(tmp_path):
    text = render(job(), ClusterProfile(modules=("cuda/12.8",)))
    (line,) = [line for line in text.splitlines() if line.startswith("module load")]
    assert runs_to("echo on", f"module() {{ return 1; }}\n{line}") == "not started: no module cuda/12.8\n"
    assert runs_to("echo on", f"module() {{ return 0; }}\n{line}") == "on\n"


def runs_to(end: str, lines: str) -> str:
    """What a script of these lines prints that says what it says."""
    text = f'say() {{ echo "$*"; }}\n{lines}\n{end}'
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True).stdout


def test_a_job_runs_a_snapshot_of_the_code_however_that_is_edited_afterwards(tmp_path, monkeypatch):
    mine = job(output=tmp_path / "run")
    script.write_script(mine, ClusterProfile())
    (snapshot,) = mine.folder.glob("code-*")
    text = mine.script.read_text()
    begin, end = text.index("code=$here/"), text.index("export PYTHONUNBUFFERED")
    where = "import launch.slurm, rlhf, json; print(launch.slurm.__path__[0], rlhf.__path__[0])"
    lines = f"here={mine.folder}\ncd {ROOT}\n{text[begin:end]}"
    assert runs_to(f"{sys.executable} -c '{where}'", lines).split() == [f"{snapshot}/launch/slurm", f"{snapshot}/rlhf"]
    monkeypatch.setattr(script, "snapshot_name", lambda: "code-other")
    script.write_script(mine, ClusterProfile())
    assert {path.name for path in mine.folder.glob("code-*")} == {snapshot.name, "code-other"}, "requeued jobs need it"


FAKES = {
    "scontrol": 'echo "scontrol $*" >> $CALLS\n'
    'case "$*" in *hostnames*) printf "n1\\nn2\\n";; *) echo NodeAddr=n1;; esac',
    "squeue": "echo RUNNING",
    "srun": 'case "$*" in *supervisor*) exec $RUN;; *preflight*) exec $FIT;; esac',
}


@pytest.fixture
def run_job(tmp_path):
    """``run_job(run, fit=...)``: the script of two nodes with shell commands in the place of SLURM's; log and calls."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    mine = job(output=tmp_path / "run")
    path = tmp_path / "job.sh"
    written = render(mine, ClusterProfile(nodes=2, devices=4, max_node_failures=2))

    def act(run: str, fit: str = "true", restart: int = 0, early_seconds: int | None = None) -> tuple[str, str]:
        """``early_seconds``: how long a request is somebody's; else what follows from the time of the profile."""
        short = r"\1" if early_seconds is None else str(early_seconds)
        path.write_text(re.sub(r'(?<="\$SECONDS" -lt )(\d+)', short, written))
        for name, text in {"train": run, "fit": fit}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "CALLS": str(tmp_path / "calls"),
            "RUN": str(tmp_path / "train"),
            "FIT": str(tmp_path / "fit"),
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_RESTART_COUNT": str(restart),
        }
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr, (tmp_path / "calls").read_text()

    return act


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", True),
        ("RuntimeError: CUDA error: unspecified launch failure", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False),
        ("ValueError: margins", False),
    ],
)
def test_a_fault_of_a_gpu_names_the_node_of_the_rank_that_has_it(tmp_path, capsys, monkeypatch, reason, bad):
    status = new_status("reward", state="failed", rank=5, reason=reason)
    statuses.write_status(tmp_path, status)
    (tmp_path / "hosts").write_text("n1 slots=4\nn2 slots=1\nn3 slots=8\n")
    monkeypatch.setattr(sys, "argv", ["bad_gpu", str(tmp_path / "status.json"), str(tmp_path / "hosts")])
    assert bad_gpu.main() == (0 if bad else 1)
    assert capsys.readouterr().out == ("n3\n" if bad else "")


STATUS_OF = (
    '{{"stage": "reward", "state": "failed", "step": {step}, "rank": {rank}, "reason": "{reason}", "started": 1, '
    '"updated": 1, "machine": "n1", "process": 1}}'
)


def crash(folder: Path, step: int, rank: int = 0, reason: str = "ValueError: odd") -> str:
    """Shell commands that leave a run behind whose rank broke."""
    said = json.dumps(json.loads(STATUS_OF.format(step=step, rank=rank, reason=reason)), indent=2)
    return f"mkdir -p {folder}/run; cat > {folder}/run/status.json <<'END'\n{said}\nEND\nexit 1"


def test_a_crash_is_tried_again_as_long_as_the_run_comes_further_and_not_on_a_node_whose_gpu_broke(run_job, tmp_path):
    text, calls = run_job(crash(tmp_path, 7))
    assert "crashed with exit code 1, and had come further than before: back into the queue" in text
    assert "scontrol requeue 12" in calls and "ExcNodeList" not in calls
    text, calls = run_job(crash(tmp_path, 7), restart=1)
    assert "failed with exit code 1" in text and "requeue" not in calls, "it came no further"
    text, calls = run_job(crash(tmp_path, 9, rank=6, reason="CUDA error: uncorrectable ECC error"), restart=2)
    assert "scontrol update JobId=12 ExcNodeList=n2" in calls and "from now on without n2" in text
    text, calls = run_job("exit 2", restart=3)
    assert "failed with exit code 2" in text and "requeue" not in calls, "what is refused is refused again"


def test_of_a_stage_on_a_part_of_the_nodes_the_bad_gpu_is_on_one_of_its_own(tmp_path):
    folder = tmp_path / "run" / "left"
    entries = tuple(
        SimpleNamespace(name=name, output=tmp_path / "run" / name, ranks=None) for name in ("left", "right")
    )
    text = render(job(output=tmp_path / "run", stages=entries, pipeline=True), ClusterProfile(nodes=2))
    lines = [line for line in text.splitlines() if line.startswith(("statuses=", "hostfiles="))]
    for name, ranks in {"left": "n2 slots=4", "right": "n1 slots=4"}.items():
        statuses.write_status(tmp_path / "run" / name, new_status("reward", state="running"))
        (tmp_path / "run" / "logs" / name).mkdir(parents=True)
        (tmp_path / "run" / "logs" / name / "hostfile").write_text(f"{ranks}\n")
    (tmp_path / "all").write_text("n1 slots=4\nn2 slots=4\n")
    reason = "CUDA error: uncorrectable ECC error"
    statuses.write_status(folder, new_status("reward", state="failed", rank=1, reason=reason))
    check = "\n".join([*lines, functions_of(text, "note_bad_gpu"), "note_bad_gpu"])
    environment = os.environ | {"RLHF_HOSTFILE": str(tmp_path / "all"), "unfit": str(tmp_path / "unfit")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", check], env=environment | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "unfit").read_text() == "n2\n"


def test_a_pipeline_is_told_of_requests_by_the_note_of_its_own_job_and_not_by_a_file_for_all():
    text = render(job(pipeline=True, arguments=("rlhf", "pipeline", "run", "p.yaml")), ClusterProfile())
    assert "export RLHF_ASKED=" in text and 'STOP"' not in text
    assert 'touch "$run/STOP"' in render(job(), ClusterProfile())


def test_a_node_that_is_not_fit_is_left_out_and_only_so_often(run_job, tmp_path):
    unfit = f"for token in {tmp_path}/run/slurm/seen-12-*; do touch $token.unfit-n2; done; exit 1"
    for restart in range(2):
        text, calls = run_job("true", unfit, restart)
        assert "a node is not fit: back into the queue" in text and "ExcNodeList=n2" in calls
    text, calls = run_job("true", unfit, 2)
    assert "a node is not fit, for the 3. time: not requeued" in text and "requeue" not in calls


@pytest.mark.parametrize(
    ("fit", "run", "said"),
    [
        ("kill -TERM $$", "exit 0", "stopped on SIGTERM before anything had started"),
        ("kill -USR1 $PPID; exit 1", "exit 0", "stopped on SIGUSR1 before anything had started"),
        ("kill -USR1 $PPID", "exit 75", "saved and stopped on SIGUSR1"),
        ("exit 0", "exit 143", "ended with exit code 143 on SIGTERM"),
        ("exit 0", "kill -TERM $(ps -o ppid= -p $PPID); exit 1", "ended with exit code 1 on SIGTERM"),
    ],
    ids=["the steps are told", "all are told", "the shell is told", "ranks that do not listen yet", "all, later"],
)
def test_whoever_is_asked_to_stop_while_it_starts_goes_back_into_the_queue(run_job, fit, run, said):
    """Preempted or paused in its first seconds: no node is unfit, nothing has crashed."""
    text, calls = run_job(run, fit, restart=1)
    assert f"{said}: back into the queue" in text
    assert "scontrol requeue 12" in calls and "ExcNodeList" not in calls


def test_a_step_that_only_listens_writes_down_what_it_hears_and_leaves_nothing_behind(tmp_path):
    (listener,) = re.findall(r"bash -c '(.*?)'", render(job(), ClusterProfile()), flags=re.DOTALL)
    asked = tmp_path / "asked"
    process = psutil.Popen(["bash", "-c", listener], env=os.environ | {"RLHF_ASKED": str(asked)})
    deadline = time.monotonic() + 60
    for said in ("SIGUSR1\n", "SIGUSR1\nSIGTERM\n"):
        while not process.children():  # it listens
            assert time.monotonic() < deadline
            time.sleep(0.01)
        sleeping = process.children()
        process.send_signal(signal.Signals[said.split()[-1]])
        while not asked.exists() or asked.read_text() != said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert process.wait(60) == 0
    _, left = psutil.wait_procs(sleeping, timeout=30)
    assert not left


def test_a_job_that_is_always_at_its_time_limit_before_it_has_saved_ends(run_job):
    text, calls = run_job("exit 75", "kill -USR1 $PPID", restart=1, early_seconds=0)
    assert "saved nothing new in this start" in text and "requeue" not in calls
    text, calls = run_job("exit 75", "kill -USR1 $PPID", early_seconds=0)
    assert "saved and stopped on SIGUSR1: back into the queue" in text, "the first start"


def test_a_job_is_finished_if_this_start_said_so(tmp_path):
    check = functions_of(render(job(), ClusterProfile()), "finished") + "\nfinished"
    status, began = tmp_path / "status.json", tmp_path / "began"

    def finished(code: int) -> bool:
        return subprocess.run(["bash", "-c", f"run={tmp_path} began={began}\n{check} {code}"]).returncode == 0

    status.write_text('{\n  "state": "finished",\n  "step": 9\n}\n')
    began.touch()
    os.utime(status, (began.stat().st_mtime - 5,) * 2)
    assert not finished(0), "an earlier start has said it"
    os.utime(status, (began.stat().st_mtime + 5,) * 2)
    assert finished(0) and not finished(1)
    status.write_text('{\n  "state": "running",\n  "step": 9\n}\n')
    os.utime(status, (began.stat().st_mtime + 5,) * 2)
    assert not finished(0)


def test_bad_recipes_are_refused_before_they_wait_in_a_queue(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["slurm", "render", "reward", "--config", "launch/recipes/reward_llama3_8b.yaml", "--profile", str(EXAMPLE)]
    assert main([*words, "optim.learning_rte=1"]) == 2
    assert "did you mean optim.learning_rate?" in capsys.readouterr().err


def test_submit_without_slurm_says_where_to_go(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["slurm", "submit", "reward", "--config", "launch/recipes/reward_llama3_8b.yaml", "--profile", str(EXAMPLE)]
    assert main([*words, f"output={tmp_path}/run"]) == 2
    assert "sinfo: no such command here; submit on a login node" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
