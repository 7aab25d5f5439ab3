"""A real SLURM for tests: munged, slurmctld and four slurmd on this machine, in folders and on ports of their own.

Only processes that carry this cluster's SLURM_CONF are ever ended.
"""

import contextlib
import getpass
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import psutil

from launch.cli import main
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODES = ("node1", "node2", "node3", "node4")  # two for a job, and two to take the place of lost ones
GPUS = {"node1": 2, "node2": 1, "node3": 2}
"""How many a node says that it has: other devices stand for them, and node4 has none."""
PATIENCE = 400.0
"""Seconds until something that has not happened is a failure: a start takes 15 s on two idle cores."""
CONFIGURATION = """\
ClusterName=margin
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
KillWait=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=main Nodes=node[1-4] Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=spare Nodes=node[1-4] MaxTime=INFINITE State=UP PreemptMode=REQUEUE GraceTime=300
PartitionName=urgent Nodes=node[1-4] MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=100
PartitionName=small Nodes=node1 MaxTime=10 State=UP PreemptMode=OFF
"""


class Cluster:
    """One controller and the nodes node1 to node4, each with one CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self.environment = os.environ | {
            "SLURM_CONF": str(self.configuration),
            "PATH": f"{Path(sys.executable).parent}:{SYSTEM}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._munge: subprocess.Popen | None = None

    def start(self) -> None:
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self._start_munge()
        host = socket.gethostname()
        text = CONFIGURATION.format(host=host, folder=self.folder, user=getpass.getuser(), controller_port=free_port())
        nodes = (f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1" for n in NODES)
        nodes = (f"{line} Gres=gpu:{GPUS[n]}" if n in GPUS else line for n, line in zip(NODES, nodes, strict=True))
        self.configuration.write_text(text + "\n".join(nodes) + "\n")
        gpus = ((node, file) for node, count in GPUS.items() for file in ("/dev/null", "/dev/zero")[:count])
        lines = (f"NodeName={node} Name=gpu File={file}\n" for node, file in gpus)
        (self.folder / "gres.conf").write_text("".join(lines))
        self._daemon("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.until(self._is_idle)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Let a node die as of a power failure: the daemon, its step daemons and their tasks at once."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        tasks = [each for each in self._own_processes() if each.environ().get("SLURMD_NODENAME") == node]
        parents = {parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")}
        for each in [psutil.Process(daemon), *parents, *tasks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def declare_lost(self, node: str) -> None:
        """What SLURM does by itself once a node was silent for SlurmdTimeout."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def mend_node(self, node: str) -> None:
        """Its daemon starts; whoever was declared lost comes back by itself (ReturnToService) as soon as it reports."""
        self.start_node(node)
        sinfo = ("sinfo", "--noheader", "--format=%T", f"--nodes={node}")
        self.until(lambda: set(self.run(*sinfo).stdout.split()) == {"idle"})

    def stop(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--user", getpass.getuser(), check=False)
            self.until(lambda: not self.run("squeue", "--noheader").stdout.strip(), timeout=30)
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = self._own_processes()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            psutil.wait_procs(left, timeout=10)
        if self._munge is not None:
            self._munge.terminate()
            self._munge.wait(timeout=10)

    def run(self, *command: str, check: bool = True, timeout: float = 60, **environment: str):
        """A command with this cluster's environment."""
        done = subprocess.run(
            command, env=self.environment | environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done

    def rlhf(self, *arguments: str, expect: int = 0) -> str:
        """What the command prints, run in this process: a fresh one would import torch first."""
        said = io.StringIO()
        environment = mock.patch.dict(os.environ, self.environment)
        with environment, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(arguments)
        assert code == expect, said.getvalue()
        return said.getvalue()

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED and so on."""
        return self._show(number)["JobState"]

    def restarts(self, number: str) -> int:
        return int(self._show(number)["Restarts"])

    def run_seconds(self, number: str) -> int:
        """How long a job has been running since its last start."""
        hours, minutes, seconds = map(int, self._show(number)["RunTime"].split(":"))
        return (hours * 60 + minutes) * 60 + seconds

    def wait(self, number: str, state: str, log: Path) -> None:
        """Wait for the state that a job shall end in; any other end fails the test with the job's log."""
        self.until(lambda: self._alive(number, log, state) == state, log)

    def wait_for_restart(self, number: str, count: int, log: Path) -> None:
        """Wait until a job was requeued ``count`` times and has started again."""
        self.until(lambda: self._alive(number, log) == "RUNNING" and self.restarts(number) == count, log)

    def _alive(self, number: str, log: Path, wanted: str = "RUNNING") -> str:
        found = self.state(number)
        allowed = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SIGNALING", wanted)
        assert found in allowed, f"job {number} is {found}, expected {wanted}\n{_text(log)}"
        return found

    def until(self, condition: Callable[[], bool], log: Path | None = None, timeout: float = PATIENCE) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout} s\n{self._story()}\n{_text(log)}"
            time.sleep(0.2)

    def _show(self, number: str) -> dict[str, str]:
        words = self.run("scontrol", "--oneliner", "show", "job", number).stdout.split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def _is_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", "--partition=main", check=False).stdout
        return states.split() == ["idle"] * len(NODES)

    def _daemon(self, program: str, *arguments: str) -> None:
        self.run(program, *arguments)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        command = ["munged", "--foreground", "--force", f"--key-file={key}", "--num-threads=2", *options]
        self._munge = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        self.until((folder / "socket").exists)

    def _own_processes(self) -> list[psutil.Process]:
        """What carries the configuration of this cluster, apart from munged and this very process."""
        others = {os.getpid(), self._munge.pid if self._munge else 0}
        return [each for each in psutil.process_iter() if each.pid not in others and self._is_own(each)]

    def _is_own(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("slurmstepd"):  # which writes its title over its environment
                return process.cwd().startswith(str(self.folder))
            return process.environ().get("SLURM_CONF") == str(self.configuration)
        return False

    def _story(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{_text(path)[-2000:]}" for path in sorted(self.folder.glob("*.log")))


def _text(path: Path | None) -> str:
    return path.read_text(errors="replace")[-6000:] if path and path.exists() else ""
