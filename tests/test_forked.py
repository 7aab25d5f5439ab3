"""Forked ranks behave as processes that start cold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
TELL = """
import json, os, signal, sys, torch
import torch.distributed
print(json.dumps({
    "name": __name__, "arguments": sys.argv[1:], "script": os.path.basename(sys.argv[0]), "path": sys.path[:3],
    "folder": os.getcwd(), "mine": os.environ.get("MINE"), "other": os.environ.get("OTHER"),
    "threads": torch.get_num_threads(), "joined": torch.distributed.is_initialized(),
    "signals": [signal.getsignal(each) == signal.SIG_DFL for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "same session": os.getsid(0), "same group": os.getpgid(0), "alone": len(os.listdir("/proc/self/task")) == 1,
}))
print("and this", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def fork(zygote, tmp_path):
    """``fork(source, *arguments, **environment)``: a process that runs these lines."""
    started = []

    def start(source: str, *arguments: str, **environment: str):
        path = tmp_path / "tell.py"
        path.write_text(source)
        started.append(zygote.start([str(path), *arguments], os.environ | environment, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_a_fork_starts_as_a_fresh_interpreter_does(fork, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER", "x")
    environment = {"MINE": "y", "PYTHONPATH": f"{ROOT}:/nowhere"}
    found = fork(TELL, "a", "b c", **environment)
    said, _ = found.communicate(timeout=60)
    cold = [sys.executable, str(tmp_path / "tell.py"), "a", "b c"]
    cold = subprocess.run(cold, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(said.splitlines()[0]) == json.loads(cold.stdout)
    assert said.splitlines()[1] == cold.stderr.splitlines()[-1] == "and this"
    assert found.returncode == cold.returncode == 7


def test_a_module_runs_as_main_with_its_folder_in_front(zygote, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__main__.py").write_text(TELL)
    found = zygote.start(["-m", "mine", "--x"], os.environ, tmp_path)
    said = json.loads(found.communicate(timeout=60)[0].splitlines()[0])
    assert (said["name"], said["arguments"], said["path"][0]) == ("__main__", ["--x"], str(tmp_path))


def test_an_exception_is_shown_and_exit_code_1(fork):
    found = fork("raise ValueError('odd')")
    assert "ValueError: odd" in found.communicate(timeout=60)[0] and found.returncode == 1


def test_what_one_fork_does_the_next_does_not_see(fork):
    first = fork("import os, rlhf.config\nrlhf.config.mine, os.environ['X'] = 1, '1'")
    assert first.wait(timeout=60) == 0
    second = fork("import os, rlhf.config\nprint(hasattr(rlhf.config, 'mine'), 'X' in os.environ)")
    assert second.communicate(timeout=60)[0].split() == ["False", "False"]


def test_every_fork_draws_random_numbers_of_its_own(fork):
    draw = "import numpy, random, torch\nprint(random.random(), numpy.random.random(), torch.rand(1).item())"
    first, second = (fork(draw).communicate(timeout=60)[0].split() for _ in range(2))
    assert len(first) == 3 and {*first}.isdisjoint(second)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_it_with_the_code_of_that_signal(fork, number):
    found = fork("import time\nprint('here', flush=True)\ntime.sleep(60)")
    assert found.stdout.readline() == "here\n" and found.poll() is None
    os.kill(found.pid, number)
    assert found.wait(timeout=30) == -number == found.poll() == found.returncode
    found.kill()  # nothing to be done


def test_waiting_has_an_end(fork):
    found = fork("import time\ntime.sleep(60)")
    began = time.monotonic()
    for wait in (found.wait, found.communicate):
        with pytest.raises(subprocess.TimeoutExpired):
            wait(timeout=0.1)
    assert time.monotonic() - began < 20 and found.returncode is None


def test_no_two_processes_are_given_one_port():
    script = "from tests.ports import free_port\nprint(*[free_port() for _ in range(50)])\ninput()"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    others = [
        subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
        for _ in range(2)
    ]
    ports = [free_port() for _ in range(50)]
    for other in others:
        ports += map(int, other.stdout.readline().split())
    for other in others:
        other.communicate("\n")
    assert len(set(ports)) == 150
