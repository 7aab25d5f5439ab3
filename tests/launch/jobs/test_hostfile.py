"""Hostfiles, hosts that do not answer, and a run over ssh between two sshd on this machine."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from launch.jobs import hostfile
from launch.jobs.hostfile import check_hosts, read_hostfile, unreachable_hosts
from launch.jobs.over_ssh import passed_environment
from rlhf.core.errors import ConfigError
from tests.lacking import lacking
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def test_a_hostfile_keeps_the_order_of_its_lines(tmp_path):
    path = tmp_path / "hostfile"
    text = "b7  slots=8 max_slots=8\n# two of the rack\n\na3\tslots=4\n"
    for mark in ("", "\ufeff"):  # as editors of Windows put it in front
        path.write_text(mark + text, encoding="utf-8")
        assert list(read_hostfile(path).items()) == [("b7", 8), ("a3", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# nobody\n", "names no host"),
        ("a slots=2\nb\n", "line 2: 'b'"),
        ("a slots=0\n", "line 1: 'a slots=0'"),
        ("a slots=two\n", "line 1"),
        ("a slots=1\n\na slots=2\n", "line 3: host a is there twice"),
    ],
)
def test_a_hostfile_that_says_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError, match="hostfile") as caught:
        read_hostfile(path)
    assert message in str(caught.value)


def fake_ssh(folder: Path, monkeypatch, body: str) -> None:
    """An ssh whose host is its last argument but one."""
    path = folder / "bin" / "ssh"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\nshift $(($# - 2)); host=$1\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{SYSTEM}")


def test_every_silent_host_is_named_with_its_reason_and_all_are_asked_at_once(tmp_path, monkeypatch):
    body = (
        'case $host in far*) exec sleep 30;; shut) echo "Warning: odd" >&2; echo "ssh: refused" >&2; exit 255;; '
        "mute) exit 255;; esac"
    )
    fake_ssh(tmp_path, monkeypatch, body)
    began = time.monotonic()
    found = unreachable_hosts(dict.fromkeys(["far1", "here", "far2", "shut", "mute"], 1), timeout_seconds=0.5)
    assert time.monotonic() - began < 5
    assert found == {
        "far1": "no answer within 1 s",
        "far2": "no answer within 1 s",
        "shut": "ssh: refused",
        "mute": "ssh ended with exit code 255",
    }


def test_without_ssh_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="ssh: no such command"):
        unreachable_hosts({"a": 1})


def test_the_check_takes_the_options_that_pdsh_would_pass_on(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{SYSTEM}")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222 -o 'User me'")
    assert unreachable_hosts({"a": 1}) == {}
    assert (tmp_path / "words").read_text().splitlines()[-6:] == ["-p", "2222", "-o", "User me", "a", "true"]


def test_a_missing_hostfile_is_one_message_and_exit_code_2(tmp_path, capsys):
    assert hostfile.main([str(tmp_path / "hosts")]) == 2
    text = capsys.readouterr().err
    assert "no such file" in text and "slots=" in text
    assert "Traceback" not in text


# ---- over ssh, for real


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _start_sshd(folder: Path, port: int, authorized: Path) -> subprocess.Popen:
    settings = folder / f"sshd-{port}"
    settings.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {authorized}\n"
        f"PidFile {folder}/sshd-{port}.pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPrintMotd no\n"
    )
    program = shutil.which("sshd", path=SYSTEM)  # which insists on its full path
    return subprocess.Popen([program, "-D", "-e", "-f", str(settings)], stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """The hosts node1 and node2: two sshd on this machine. Its ssh knows them, and node3, where nobody listens."""
    needed = ("sshd", "ssh", "ssh-keygen")
    missing = [program for program in needed if shutil.which(program, path=SYSTEM) is None]
    if missing:
        lacking(f"no {', '.join(missing)}: apt-get install openssh-server (.ci/run does)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it, and only its init script makes it
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        _keygen(folder / name)
    ports = {f"node{number}": free_port() for number in (1, 2, 3)}
    lines = [f"Host {host}\n  HostName 127.0.0.1\n  Port {port}" for host, port in ports.items()]
    common = (
        f"Host *\n  User {getpass.getuser()}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR"
    )
    (folder / "config").write_text("\n".join([*lines, common, ""]))
    program = folder / "bin" / "ssh"  # what a user has in ~/.ssh/config, for the check, deepspeed and pdsh alike
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/config "$@"\n')
    program.chmod(0o755)
    daemons = [_start_sshd(folder, ports[host], folder / "user.pub") for host in ("node1", "node2")]
    environment = os.environ | {
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{SYSTEM}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    try:
        _wait_for_ports([ports["node1"], ports["node2"]])
        yield SimpleNamespace(environment=environment, folder=folder, ports=ports)
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=10)


def _wait_for_ports(ports: list[int]) -> None:
    deadline = time.monotonic() + 20
    for port in ports:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline, f"no sshd on port {port}"
            time.sleep(0.1)


def over_ssh(hosts, name: str, text: str) -> dict[str, str]:
    """The environment of a run with a hostfile of this text, which is in HOSTFILE."""
    path = hosts.folder / name
    path.write_text(text)
    (hosts.folder / "deepspeed_env").write_text("GLOO_SOCKET_IFNAME=lo\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    return hosts.environment | {
        "HOSTFILE": str(path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ENV_FILE": str(hosts.folder / "deepspeed_env"),
    }


def train_over_ssh(hosts, name: str, text: str, *arguments: str) -> subprocess.CompletedProcess:
    """launch/scripts/ssh_hostfile.sh with a hostfile of this text."""
    script = ROOT / "launch" / "scripts" / "ssh_hostfile.sh"
    return subprocess.run(
        [str(script), *arguments],
        env=over_ssh(hosts, name, text),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_real_hosts_answer_and_one_where_nobody_listens_does_not(two_hosts, monkeypatch):
    monkeypatch.setenv("PATH", two_hosts.environment["PATH"])
    found = unreachable_hosts({"node1": 1, "node3": 1, "node2": 1})
    assert list(found) == ["node3"]
    assert "refused" in found["node3"].lower()


@pytest.mark.dist
@pytest.mark.slow
def test_two_hosts_over_ssh_train_as_two_ranks_on_one(two_hosts, tiny_recipe, run_ranks, runs, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run_ranks(["-m", "reward", *tiny_recipe, "train.publish=none", f"output={here}"])
    settings = (*tiny_recipe, "train.publish=none", f"output={there}")
    done = train_over_ssh(two_hosts, "hosts", "node1 slots=1\nnode2 slots=1\n", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout and "ZeRO-2" in done.stdout
    assert (there / "done.json").is_file()
    runs.assert_close(runs.rows(there), runs.rows(here), 1e-5)


def processes_with(words: str) -> list[psutil.Process]:
    """Whose command line has ``words`` in it."""
    return [each for each in psutil.process_iter(["cmdline"]) if words in " ".join(each.info["cmdline"] or [])]


def start_over_ssh(hosts, name: str, text: str, command: list[str], folder: Path, **environment: str):
    """``command`` for each device of a hostfile of this text, as a pipeline starts it."""
    found = over_ssh(hosts, name, text) | environment
    words = [sys.executable, "-m", "launch.jobs.over_ssh", found["HOSTFILE"], "--", *command]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=found, cwd=folder, **pipes)


TELLS = (
    "import json, os; name = 'rank' + os.environ['RANK']; open(name, 'w').write(json.dumps(dict(os.environ))); "
    "argv = open('/proc/self/cmdline').read() + open(f'/proc/{os.getppid()}/cmdline').read(); print(argv)"
)


def test_chosen_variables_pass_and_no_secret_is_in_a_log_or_on_a_command_line(two_hosts, tmp_path):
    """In a folder, and with values, that a shell would take for something else."""
    folder = tmp_path / "it's; touch $HOME #`date`"
    folder.mkdir()
    secret = "hf_'$(touch gone)\n\"secret"
    more = {
        "HF_TOKEN": secret,
        "WANDB_API_KEY": "k3y",
        "OMP_NUM_THREADS": "7",
        "CUDA_VISIBLE_DEVICES": "5",
        "MINE": "1",
    }
    command = [sys.executable, "-c", TELLS, "a b'c"]
    process = start_over_ssh(two_hosts, "told", "node1 slots=1\nnode2 slots=2\n", command, folder, **more)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 0, said
    found = [json.loads((folder / f"rank{rank}").read_text()) for rank in range(3)]
    for each in found:
        assert (each["HF_TOKEN"], each["WANDB_API_KEY"]) == (secret, "k3y")
        assert each["GLOO_SOCKET_IFNAME"] == "lo", "of the file that DeepSpeed's launcher reads, too"
        assert "MINE" not in each and each.get("CUDA_VISIBLE_DEVICES") != "5", "devices are those of the host"
    assert [each["LOCAL_RANK"] for each in found] == ["0", "0", "1"]
    assert "a b'c" in said and "secret" not in said and "k3y" not in said


def test_the_file_for_deepspeeds_launcher_is_read_as_its_shell_would(tmp_path, monkeypatch):
    (tmp_path / "file").write_text(
        "# mine\nA=1\nexport HF_TOKEN='a b'\n B=\"x=y\" \nC=it's\n\nD=\nnothing\n\"E=1\nCUDA_VISIBLE_DEVICES=2,3\n"
    )
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "file"))
    found = passed_environment()
    names = ("A", "HF_TOKEN", "B", "C", "D", "CUDA_VISIBLE_DEVICES")
    assert [found[name] for name in names] == ["1", "a b", "x=y", "it's", "", "2,3"]


def test_a_hostfile_with_one_host_starts_there_and_not_here(two_hosts, tmp_path):
    command = [sys.executable, "-c", "import os; open('there', 'w').write(os.environ.get('SSH_CONNECTION', 'here'))"]
    process = start_over_ssh(two_hosts, "one", "node2 slots=1\n", command, tmp_path, SSH_CONNECTION="here")
    assert process.wait(100) == 0
    assert (tmp_path / "there").read_text().split()[-1] == str(two_hosts.ports["node2"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_on_other_hosts_save_when_asked_and_end_when_who_started_them_is_gone(two_hosts, tmp_path, number):
    script = (
        "import os, signal, sys, time; asked = []; signal.signal(signal.SIGTERM, lambda *_: asked.append(1)); "
        "open('here' + os.environ['RANK'], 'w').close()\nwhile not asked: time.sleep(0.05)\n"
        "time.sleep(1); open('saved' + os.environ['RANK'], 'w').close(); sys.exit(75)"
    )
    command = [sys.executable, "-c", script, f"mark-{tmp_path}"]
    process = start_over_ssh(two_hosts, "asked", "node1 slots=1\nnode2 slots=1\n", command, tmp_path)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"here{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    code = process.wait(60)
    if number == signal.SIGTERM:
        assert code == 75 and all((tmp_path / f"saved{rank}").exists() for rank in range(2))
    while processes_with(f"mark-{tmp_path}"):
        assert time.monotonic() < deadline, "they train on, and nobody knows"
        time.sleep(0.1)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.full
def test_a_pipeline_over_ssh_goes_on_when_it_was_killed(two_hosts, tiny_recipe, run_ranks, runs, tmp_path):
    """Ranks behind an sshd are no children of the pipeline: those of the killed one must not meet those of the next."""
    longer = "train.epochs=10"
    run_ranks(["-m", "reward", *tiny_recipe, longer, "train.publish=none", f"output={tmp_path}/here"])
    recipe = tmp_path / "over_ssh.yaml"
    recipe.write_text(f"output: {tmp_path}/out\nstages: {{reward: {{recipe: {tiny_recipe[1]}}}}}\n")
    environment = over_ssh(two_hosts, "pair", "node1 slots=1\nnode2 slots=1\n")
    command = [sys.executable, "-m", "launch.cli", "pipeline", "run", str(recipe), "--no-doctor"]
    command += ["--hostfile", environment["HOSTFILE"], f"reward.{longer}", "reward.train.checkpoint_every=10"]
    options = {"env": environment, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **options)
    folder = tmp_path / "out" / "reward"
    runs.kill_when([process], lambda: runs.step_is_saved(folder, 10))
    done = subprocess.run(command, **options, timeout=500)
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "out" / "logs" / "reward" / "rank0.log").read_text()
    assert log.count("resuming from") == 1
    runs.assert_close(runs.rows(folder), runs.rows(tmp_path / "here"), 1e-5)
    assert processes_with(f"--log-folder {tmp_path}/out/logs/") == []


def test_an_unreachable_host_or_a_missing_hostfile_is_refused_before_anything_starts(two_hosts, tiny_recipe, tmp_path):
    output = tmp_path / "run"
    done = train_over_ssh(two_hosts, "hosts", "node1 slots=1\nnode3 slots=1\n", *tiny_recipe, f"output={output}")
    assert done.returncode == 2
    assert "node3: " in done.stderr and "nothing was started" in done.stderr and "Traceback" not in done.stderr
    assert not output.exists()
    with pytest.raises(ConfigError, match="no such file"):
        check_hosts(tmp_path / "missing")


WORKERS = ROOT / "tests" / "launch" / "pipeline" / "workers"


@pytest.mark.dist
@pytest.mark.slow
def test_stages_on_a_part_of_the_hosts_run_there_and_side_by_side(two_hosts, tmp_path):
    """A node each, of which the second does not begin with the first host; then both, then two of one host."""
    one, both = {"nodes": 1}, {"after": ["a", "b"]}
    half = {"nodes": 1, "ranks": 1}
    entries = {
        "a": one | {"set": {"meets": ["b"]}},
        "b": one | {"set": {"meets": ["a"]}},
        "all": both,
        "c": half | {"after": ["all"], "set": {"meets": ["d"]}},
        "d": half | {"after": ["all"], "set": {"meets": ["c"]}},
    }
    recipe = tmp_path / "toys.yaml"
    stages = {name: {"kind": "toy", **entry} for name, entry in entries.items()}
    recipe.write_text(yaml.safe_dump({"output": f"{tmp_path}/out put", "stages": stages}, sort_keys=False))
    environment = over_ssh(two_hosts, "part", "node1 slots=2\nnode2 slots=2\n") | {"PYTHONPATH": f"{ROOT}:{WORKERS}"}
    (two_hosts.folder / "deepspeed_env").write_text("CUDA_VISIBLE_DEVICES=4,7\n")
    words = [sys.executable, str(WORKERS / "run_toys.py"), str(recipe), "hostfile", environment["HOSTFILE"]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr

    def seen(stage: str) -> list[tuple[str, str]]:
        """The host of each rank, and the devices that it sees."""
        ports = {str(port): host for host, port in two_hosts.ports.items()}
        told = [json.loads(path.read_text()) for path in sorted((tmp_path / "out put" / stage).glob("seen*"))]
        return [(ports[each["SSH_CONNECTION"].split()[-1]], each["CUDA_VISIBLE_DEVICES"]) for each in told]

    assert {name: seen(name) for name in entries} == {
        "a": [("node1", "4,7")] * 2,
        "b": [("node2", "4,7")] * 2,
        "all": [("node1", "4,7")] * 2 + [("node2", "4,7")] * 2,
        "c": [("node1", "4")],
        "d": [("node1", "7")],
    }


def test_what_is_left_of_one_stage_is_ended_on_its_host_and_that_of_another_is_not(two_hosts, tmp_path, monkeypatch):
    """Of two whose names begin alike."""
    monkeypatch.setenv("PATH", two_hosts.environment["PATH"])
    words = [sys.executable, "-c", "import time; time.sleep(60)", "--log-folder"]
    left = {name: subprocess.Popen([*words, f"{tmp_path}/logs/{name}"]) for name in ("a", "ab")}
    hostfile.end_on_hosts(["node1"], f"--log-folder {tmp_path}/logs/a")
    assert left["a"].wait(10) == -signal.SIGKILL and left["ab"].poll() is None
    hostfile.end_on_hosts(["node1"], f"--log-folder {tmp_path}/logs/")
    assert left["ab"].wait(10) == -signal.SIGKILL
