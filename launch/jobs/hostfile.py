"""Hostfiles: which nodes a run has and how many devices each, as DeepSpeed reads them.

DeepSpeed itself takes a missing hostfile for "this machine alone" and finds out about a node that does not answer
after the others have started. Both are checked here first.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf.core.errors import ConfigError, UserError
from rlhf.core.files import write_text
from rlhf.core.paths import home_path

CONNECT_SECONDS = 10.0
"""How long a node may take to answer."""
_AT_ONCE = 32
_ENTRY = re.compile(r"(\S+)\s+slots=(\d+)(?:\s.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Devices by host, in the order of the file, which is the order of the ranks.

    Raises:
        ConfigError: if the file is missing, empty or malformed, or names a host twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"hostfile {path}: no such file; it has a line 'HOST slots=DEVICES' for each node") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile {path}: cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        host, slots = _entry(f"hostfile {path}, line {number}", text)
        if host in hosts:
            raise ConfigError(f"hostfile {path}, line {number}: host {host} is there twice; give it one line")
        hosts[host] = slots
    if not hosts:
        raise ConfigError(f"hostfile {path}: names no host; expected lines such as 'node1 slots=8'")
    return hosts


def write_hostfile(path: Path, hosts: Mapping[str, int]) -> None:
    """What :func:`read_hostfile` reads."""
    write_text(path, "".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))


def check_hosts(path: Path) -> dict[str, int]:
    """The hosts of a hostfile, all of which answer.

    Raises:
        ConfigError: as :func:`read_hostfile`, and naming every host that cannot be reached.
    """
    hosts = read_hostfile(path)
    silent = unreachable_hosts(hosts)
    if silent:
        lines = "".join(f"\n  {host}: {reason}" for host, reason in silent.items())
        raise ConfigError(
            f"hostfile {path}: {len(silent)} of {len(hosts)} hosts cannot be reached over ssh, so nothing was started:"
            f"{lines}\n'ssh HOST true' must work without a password; or take these hosts out of the file"
        )
    return hosts


def _entry(place: str, text: str) -> tuple[str, int]:
    found = _ENTRY.fullmatch(text)
    if found is None or int(found[2]) == 0:
        raise ConfigError(f"{place}: {text!r}: expected 'HOST slots=DEVICES' with at least one device")
    return found[1], int(found[2])


def unreachable_hosts(
    hosts: Mapping[str, int], *, timeout_seconds: float = CONNECT_SECONDS, ssh_options: tuple[str, ...] | None = None
) -> dict[str, str]:
    """Which hosts cannot be reached over ssh, each with the reason; all are tried at once.

    Args:
        hosts: devices by host.
        timeout_seconds: how long a host may take to connect; the answer itself may take as long again.
        ssh_options: words for ssh; ``None`` for those that pdsh would add (PDSH_SSH_ARGS_APPEND).
    Raises:
        ConfigError: if there is no ssh.
    """
    reasons = _on_all(hosts, "true", timeout_seconds, ssh_options)
    return {host: reason for host, reason in reasons.items() if reason is not None}


def ssh_words(timeout_seconds: float = CONNECT_SECONDS, options: tuple[str, ...] | None = None) -> list[str]:
    """The start of a command line over ssh that asks nobody for a password.

    Args:
        timeout_seconds: how long a host may take to connect.
        options: words for ssh; ``None`` for those that pdsh would add (PDSH_SSH_ARGS_APPEND).
    """
    if options is None:
        options = tuple(shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")))
    alive = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8")
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(timeout_seconds))}", *alive, *options]


def end_on_hosts(hosts: Iterable[str], words: str) -> None:
    """Kill the processes of all hosts whose command line has ``words`` in it. A host that is silent is left out.

    Args:
        hosts: where.
        words: whole words, or the beginning of a path that ends with a slash.
    """
    literal = re.sub(r"([][.^$*+?(){}|\\])", r"\\\1", words[1:])
    end = "" if words.endswith("/") else "( |$)"
    pattern = f"[{words[0]}]{literal}{end}"  # which is not what the command line of pkill itself says
    _on_all(hosts, f"pkill -KILL -f {shlex.quote(pattern)}", CONNECT_SECONDS, None)


def _on_all(
    hosts: Iterable[str], command: str, timeout_seconds: float, ssh_options: tuple[str, ...] | None
) -> dict[str, str | None]:
    """Run ``command`` on all hosts at once: what went wrong on each, ``None`` for nothing."""
    ssh = ssh_words(timeout_seconds, ssh_options)
    hosts = list(hosts)
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        reasons = pool.map(lambda host: _why_failed([*ssh, host, command], 2 * timeout_seconds), hosts)
    return dict(zip(hosts, reasons, strict=True))


def _why_failed(command: list[str], timeout_seconds: float) -> str | None:
    """``None`` if ``command`` ends well in time, else what it said last."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_seconds:g} s"
    except FileNotFoundError:
        raise ConfigError("ssh: no such command; install an ssh client, or start the run inside SLURM") from None
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1].strip() if said else f"ssh ended with exit code {done.returncode}"


def main(argv: list[str] | None = None) -> int:
    """``python -m launch.jobs.hostfile FILE``: read it and try to reach every host; exit code 2 if that fails."""
    parser = argparse.ArgumentParser(prog="launch.jobs.hostfile", description=main.__doc__)
    parser.add_argument("hostfile", type=home_path)
    try:
        check_hosts(parser.parse_args(argv).hostfile)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
