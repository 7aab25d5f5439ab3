"""Ranks of a node: started with what is theirs, told at once, and never left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.jobs import supervisor
from launch.jobs.launcher import Job, Machine, find_machine, stage_command
from launch.jobs.srun import SUPERVISOR
from launch.stages import Stage

ROOT = Path(__file__).resolve().parents[3]
SAVES_SLOWLY = """
import os, signal, sys, time
from pathlib import Path
rank, asked = os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
Path(f"listens{rank}").write_text(str(os.getpid()))
while not asked:
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
Path(f"saved{rank}").write_text(str(asked[0]))
sys.exit(75)
"""
TELLS = "import json, os; open('rank' + os.environ['RANK'], 'w').write(json.dumps(dict(os.environ)))"
CRASHES = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
)
WITHOUT_NEW_CALLS = """
import os, signal
for module, names in {
    os: "pidfd_open P_PIDFD memfd_create copy_file_range eventfd splice getrandom preadv pwritev posix_openpt setns",
    signal: "pidfd_send_signal",
}.items():
    for name in names.split():
        hasattr(module, name) and delattr(module, name)
"""
"""What a Python lacks that was built where the C library or the kernel is old."""


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([*SUPERVISOR, *words], cwd=folder, env=os.environ | environment)


def ranks(script: str, *arguments: str, slots: str = "2") -> list[str]:
    return ["--slots", slots, "--", sys.executable, "-c", script, *arguments]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listening(folder: Path, count: int = 2) -> list[int]:
    """The process ids of ranks that listen to signals."""
    paths = [folder / f"listens{rank}" for rank in range(count)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("devices", ["2,3", "GPU-8f1b,GPU-90aa", "MIG-1/2/0,MIG-1/3/0", "", None])
def test_ranks_see_the_devices_that_are_visible_to_who_starts_them(tmp_path, monkeypatch, devices):
    if devices is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(TELLS)
    command = stage_command(Stage(name="toy", module="toy", config=""), [], Machine(ranks=2))
    with Job(command, tmp_path / "log.txt") as job:
        assert job.wait(60) == 0, (tmp_path / "log.txt").read_text()
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}").read_text())
        assert found.get("CUDA_VISIBLE_DEVICES") == devices
        assert (found["LOCAL_RANK"], found["WORLD_SIZE"], found["LOCAL_SIZE"]) == (str(rank), "2", "2")


def test_nodes_may_have_different_numbers_of_ranks(tmp_path):
    words = ranks(TELLS, slots="1,3,2")
    for node in ("0", "1", "2"):
        assert start(tmp_path, "--node", node, "--address", "a", "--port", "7", *words).wait(60) == 0
    found = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(6)]
    assert [each["LOCAL_RANK"] for each in found] == ["0", "0", "1", "2", "0", "1"]
    assert [each["LOCAL_WORLD_SIZE"] for each in found] == ["1", "3", "3", "3", "2", "2"]
    assert {(each["WORLD_SIZE"], each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found} == {("6", "a", "7")}
    assert supervisor._counts("8x3,2") == [8, 8, 8, 2]


def test_a_step_of_another_number_of_nodes_starts_nothing(tmp_path):
    node = {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1"}
    assert start(tmp_path, "--node", "slurm", *ranks(TELLS, slots="1x2"), **node).wait(60) == 2
    assert not (tmp_path / "rank0").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_all_ranks_are_told_at_once_and_have_the_time_that_they_need(tmp_path, number):
    script = SAVES_SLOWLY.replace("SIGTERM", signal.Signals(number).name)
    asked = tmp_path / "asked"
    process = start(tmp_path, *ranks(script, "3", slots="4"), RLHF_ASKED=str(asked))
    listening(tmp_path, 4)
    process.send_signal(number)
    assert process.wait(60) == 75
    times = [float((tmp_path / f"saved{rank}").read_text()) for rank in range(4)]
    assert max(times) - min(times) < 1.5, "one after the other they would be three seconds apart"
    assert asked.exists()


def test_ranks_that_do_not_listen_yet_are_asked_again(tmp_path):
    late = "import time; time.sleep(2)\n" + SAVES_SLOWLY
    process = start(tmp_path, *ranks(late, "0"))
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_a_rank_that_breaks_ends_the_others_and_its_exit_code_counts(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", "import sys; from launch.jobs import supervisor as s; s.SECONDS_AFTER_FAILURE = 0.5; "
         "s.SECONDS_TO_END = 0.5; sys.exit(s.main(sys.argv[1:]))", *ranks(CRASHES)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert found.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_do_not_outlive_who_asked_for_them(tmp_path, number):
    script = (
        "import pathlib, sys; from launch.jobs.launcher import Job\n"
        "with Job(sys.argv[1:], pathlib.Path('log.txt')) as job: job.wait(60)"
    )
    words = [*SUPERVISOR, *ranks(SAVES_SLOWLY, "0")]
    asking = subprocess.Popen(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    found = listening(tmp_path)
    asking.send_signal(number)
    asking.wait(60)
    wait_until(lambda: not any(map(is_running, found)))


@pytest.mark.parametrize("kind", ["ranks", "a command"])
def test_a_python_or_kernel_without_pidfd_and_other_new_calls_supervises_as_well(tmp_path, kind):
    """conda's and uv's builds of Python, and kernels before 5.3."""
    program = tmp_path / "old.py"
    program.write_text(f"{WITHOUT_NEW_CALLS}import sys; from launch.jobs.supervisor import main; sys.exit(main())")
    reading, writing = os.pipe()
    words = ranks(SAVES_SLOWLY, "0") if kind == "ranks" else ["--", *ranks(SAVES_SLOWLY, "0")[3:]]
    process = subprocess.Popen(
        [sys.executable, str(program), "--lifeline", str(reading), *words],
        cwd=tmp_path, pass_fds=(reading,), env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0"},
    )  # fmt: skip
    os.close(reading)
    found = listening(tmp_path, 2 if kind == "ranks" else 1)
    assert process.poll() is None
    os.close(writing)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not any(map(is_running, found))


def test_ranks_besides_a_hostfile_are_refused(tmp_path):
    with pytest.raises(Exception, match="--ranks 2: the hostfile"):
        find_machine(2, tmp_path / "hosts")


# Devices


@pytest.mark.parametrize(
    ("given", "seen"),
    [(None, "2,0"), ("4,5,6", "6,4"), ("GPU-a, MIG-b ,GPU-c", "GPU-c,GPU-a"), ("", ""), ("-1", "-1")],
    ids=["all", "indices", "names", "none", "none, as -1"],
)
def test_a_part_of_the_devices_is_one_of_those_that_are_visible(monkeypatch, given, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    script = "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    words = ["--slots", "1,1", "--node", "1", "--devices", "7/2,0", "--", sys.executable, "-c", script]
    done = subprocess.run([*SUPERVISOR, *words], capture_output=True, text=True)
    assert done.stdout == f"{seen!r}\n", done.stderr


def test_devices_of_rocm_are_shown_by_the_variable_that_hides_the_others():
    shown = {"HIP_VISIBLE_DEVICES": "4, 6,7", "CUDA_VISIBLE_DEVICES": "0"}
    assert supervisor.device_environment(shown, [2, 0]) == {"HIP_VISIBLE_DEVICES": "7,4"}


def test_a_device_that_is_not_visible_is_one_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    words = ["--slots", "1", "--devices", "2", "--", sys.executable, "-c", "print('started')"]
    done = subprocess.run([*SUPERVISOR, *words], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "supervisor: CUDA_VISIBLE_DEVICES=4,5 shows 2 devices, --devices wants [2]\n"
