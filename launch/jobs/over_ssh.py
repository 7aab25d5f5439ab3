"""``python -m launch.jobs.over_ssh HOSTFILE -- COMMAND...``: COMMAND once for each device of all hosts, over ssh.

On every host ssh starts a supervisor, and tells it over its stdin what to run, where, and with which environment: none
of that is on a command line, where everybody on these machines could read it. The connection is the supervisor's
lifeline: when this process ends, or the connection breaks, so do the ranks of that host.
"""

import argparse
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from launch.jobs.hostfile import read_hostfile, ssh_words
from launch.jobs.srun import SECONDS_AFTER_FIRST, SUPERVISOR
from launch.jobs.supervisor import REQUESTS, STOPPED, places_of, split_command
from rlhf.core.errors import ConfigError, UserError

PASSED = (
    *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHON", "VIRTUAL_ENV", "CONDA_", "TORCH", "PYTORCH_", "TRITON_"),
    *("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "MLFLOW_", "RLHF_", "MARGIN_RLHF_", "DS_"),
    *("OMP_", "MKL_", "OPENBLAS_", "NCCL_", "GLOO_", "UCX_", "FI_", "TMPDIR", "XDG_CACHE_HOME", "COLUMNS"),
)
"""How names of variables begin that go with the run. Which devices a host shows is its own affair."""
_END_SECONDS = 25.0
"""How long the supervisors may take to end what they have started."""
_ENVIRONMENT_FILE = ".deepspeed_env"


def passed_environment() -> dict[str, str]:
    """What the ranks get of the environment here, and of the file in which DeepSpeed's launcher looks for more."""
    found = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    given = os.environ.get("DS_ENV_FILE")
    places = [Path(given)] if given else [Path(_ENVIRONMENT_FILE), Path(os.path.expanduser("~")) / _ENVIRONMENT_FILE]
    for path in places:
        if path.is_file():
            lines = (line.strip().removeprefix("export ") for line in path.read_text().splitlines())
            pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
            return found | {name.strip(): _unquoted(value) for name, _, value in pairs}
    return found


def _unquoted(value: str) -> str:
    """DeepSpeed's launcher has a shell read what the file says, so people write quotes."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


class Hosts:
    """The connections to all hosts."""

    def __init__(self, hosts: dict[str, int], **options: Any) -> None:
        """Start a supervisor on each of ``hosts``, with ``options`` of :mod:`launch.jobs.supervisor`."""
        self._processes: list[subprocess.Popen[bytes]] = []
        environment = passed_environment()
        for node, host in enumerate(hosts):
            own = options | {"slots": [*hosts.values()], "node": node}
            request = {"options": own, "environment": environment, "folder": os.getcwd()}
            process = subprocess.Popen(
                [*ssh_words(), host, shlex.join([*SUPERVISOR, "--stdin"])], stdin=subprocess.PIPE
            )
            self._processes.append(process)
            self._tell(process, json.dumps(request))

    def watch(self, noted: list[int], woken: int) -> int:
        """Wait for the end; the exit code of the first host that broke, else :data:`STOPPED` if one stopped, else 0."""
        deadline, failed = None, None
        while True:
            codes = [process.poll() for process in self._processes]
            bad = [code for code in codes if code not in (None, 0, STOPPED)]
            if bad and failed is None:
                failed, deadline = bad[0], time.monotonic() + SECONDS_AFTER_FIRST
            if None not in codes:
                return failed if failed is not None else STOPPED if STOPPED in codes else 0
            if deadline is not None and time.monotonic() > deadline:
                return failed or 1
            if select.select([woken], [], [], 1.0)[0]:
                os.read(woken, 4096)
            while noted:
                name = signal.Signals(noted.pop(0)).name
                for process in self._processes:
                    self._tell(process, name)

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except OSError:
                continue
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _tell(self, process: "subprocess.Popen[bytes]", line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which its exit code says


def address_of(host: str) -> str:
    """Where the others reach a host: the first address that it says is its own."""
    said = subprocess.run([*ssh_words(), host, "hostname -I"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    addresses = said.stdout.split()
    if not addresses:
        raise ConfigError(f"{host}: does not say its address (hostname -I); set MASTER_ADDR to where others reach it")
    return addresses[0]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    noted, woken = _noting((*REQUESTS, signal.SIGCHLD))
    try:
        found = read_hostfile(options.hostfile)
        address = options.address or address_of(next(iter(found)))
        own = {"port": options.port, "devices": options.devices, "command": options.command}
        hosts = Hosts(found, address=address, **own)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    try:
        return hosts.watch(noted, woken)
    finally:
        hosts.end()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``command`` is what stands behind ``--``."""
    words, command = split_command(argv)
    usage = "%(prog)s [options] HOSTFILE -- COMMAND..."
    parser = argparse.ArgumentParser(prog="launch.jobs.over_ssh", usage=usage, allow_abbrev=False)
    address = "where the others reach the first host (default: MASTER_ADDR); if that is empty, the host is asked"
    parser.add_argument("--address", default=os.environ.get("MASTER_ADDR", ""), help=address)
    port = "where rank 0 listens on the first host (default: MASTER_PORT, or 29500)"
    parser.add_argument("--port", default=os.environ.get("MASTER_PORT", "29500"), help=port)
    parser.add_argument("--devices", type=places_of, help="those of every host, by their places: 2,3/0,1")
    parser.add_argument("hostfile", type=Path)
    options = parser.parse_args(words)
    if not command:
        parser.error("expected a command behind --")
    options.command = command
    return options


def _noting(numbers: Iterable[int]) -> tuple[list[int], int]:
    """Requests that come from now on, and a descriptor that can be read when something has happened."""
    noted: list[int] = []
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda number, _: noted.append(number) if number in REQUESTS else None)
    return noted, woken


if __name__ == "__main__":
    sys.exit(main())
