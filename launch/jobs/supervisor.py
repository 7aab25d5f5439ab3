"""Runs a command, or one for each rank of this node, and sees to it that nothing of it is left behind.

    python supervisor.py [--lifeline FD] -- COMMAND...
    python supervisor.py [--lifeline FD] --slots 4,2 --node 1 --address node1 --port 29500 -- COMMAND...
    ssh HOST python supervisor.py --stdin

With ``--slots`` (ranks of every node) COMMAND is started once for each rank of node ``--node``, with the environment
that torchrun gives: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. The devices that are
visible here stay visible: rank n of the node takes the n-th of them. ``--devices 2,3/0,1`` leaves some of them, by
their places on every node. With ``--stdin`` all this is one line of JSON.

* ``LIFELINE`` is the reading end of a pipe whose other end only the process that asked for the command holds. However
  that dies, kill -9 or a broken connection included, the pipe closes, and all that was started is ended.
* SIGTERM, SIGUSR1, SIGINT and SIGHUP are passed to all ranks at once. Nobody is killed for taking long over a
  checkpoint: how long they have is up to whoever asks. Ranks that still import hear of it when they listen.
* When a rank breaks, the others get a moment to say what they know, and are ended.

Standard library only: it starts at once, on any machine with Python.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks ranks to save and stop. They are deaf to it until they listen; so it is said again and again."""
SECONDS_BETWEEN_REQUESTS = 5.0
SECONDS_TO_END = 10.0
SECONDS_AFTER_FAILURE = 15.0
"""How long ranks may go on after one has broken: long enough to notice it and to write down what they saw."""
STOPPED = 75
ASKED_VARIABLE = "RLHF_ASKED"
"""Environment variable: the file that takes the name of a signal that asks the ranks to stop. A job script reads it."""


class Supervisor:
    """Processes that are started, told and ended together."""

    def __init__(self, *, lifeline: int | None, deaf: bool) -> None:
        """Be ready for whatever may happen to processes, before there are any.

        Args:
            lifeline: the descriptor whose end is theirs; requests may come over it, a signal's name a line.
            deaf: processes are started deaf to :data:`REQUESTS`.
        """
        self._lifeline, self._deaf = lifeline, deaf
        self._processes: list[subprocess.Popen] = []
        self._noted: list[int] = []
        self._request: tuple[int, float] | None = None
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._woken = woken
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the descriptor hears of it
        self._ignored = [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
        for number in PASSED_ON:
            if number not in self._ignored:
                signal.signal(number, lambda number, _: self._noted.append(number))

    def run(self, commands: Sequence[tuple[Sequence[str], dict[str, str]]]) -> int:
        """Start ``commands``, each with its environment, and wait for their end: the exit code of the first that broke.

        Without any: :data:`STOPPED` if one of them stopped, else 0.
        """
        code: int | None = None
        try:
            for command, environment in commands:
                self._start(command, environment)
            code = self._watch()
        finally:
            self._end_group()
        return code if code is not None else 128 + signal.SIGTERM

    def _start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        leader = self._processes[0].pid if self._processes else 0
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, process_group=leader, preexec_fn=self._in_child
        )
        self._processes.append(process)

    def _in_child(self) -> None:
        for number in PASSED_ON:
            if self._deaf and number in REQUESTS:
                signal.signal(number, signal.SIG_IGN)
            elif number not in self._ignored:
                signal.signal(number, signal.SIG_DFL)

    def _watch(self) -> int | None:
        """The exit code; ``None`` if nobody wants these processes any more."""
        deadline: float | None = None
        failed: int | None = None
        while True:
            codes = [process.poll() for process in self._processes]
            bad = [code for code in codes if code not in (None, 0, STOPPED)]
            if bad and failed is None:
                failed = bad[0] if bad[0] > 0 else 128 - bad[0]
                deadline = time.monotonic() + SECONDS_AFTER_FAILURE
            if None not in codes:
                return failed if failed is not None else STOPPED if STOPPED in codes else 0
            if deadline is not None and time.monotonic() > deadline:
                return failed
            if not self._hear():
                return None

    def _hear(self) -> bool:
        """Wait a moment for news, and pass requests on; false if the lifeline has ended."""
        lines = [self._woken] if self._lifeline is None else [self._woken, self._lifeline]
        ready, _, _ = select.select(lines, [], [], 1.0)
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._lifeline in ready:
            said = os.read(self._lifeline, 4096)
            if not said:
                return False
            self._noted += [signal.Signals[name] for name in said.decode().split()]
        while self._noted:
            self._pass_on(self._noted.pop(0))
        if self._deaf and self._request is not None and time.monotonic() > self._request[1]:
            self._pass_on(self._request[0])
        return True

    def _pass_on(self, number: int) -> None:
        if number in REQUESTS:
            self._request = number, time.monotonic() + SECONDS_BETWEEN_REQUESTS
            if ASKED_VARIABLE in os.environ:
                with contextlib.suppress(OSError), Path(os.environ[ASKED_VARIABLE]).open("a") as asked:
                    asked.write(f"{signal.Signals(number).name}\n")
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _end_group(self) -> None:
        """End whatever is left of these processes and of what they have started."""
        if not self._processes:
            return
        group = self._processes[0].pid
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + SECONDS_TO_END
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
                while time.monotonic() < deadline:
                    for process in self._processes:
                        process.poll()  # reaps it, else it would count as a member of the group
                    time.sleep(0.05)
                    os.killpg(group, 0)
                continue
            return


def rank_environments(slots: Sequence[int], node: int, address: str, port: str) -> list[dict[str, str]]:
    """What the environment of each rank of a node says of it."""
    common = {"WORLD_SIZE": str(sum(slots)), "MASTER_ADDR": address, "MASTER_PORT": port}
    # LOCAL_SIZE: of DeepSpeed's launcher, for its CPU accelerator.
    common |= {"LOCAL_WORLD_SIZE": str(slots[node]), "LOCAL_SIZE": str(slots[node])}
    first = sum(slots[:node])
    return [common | {"RANK": str(first + place), "LOCAL_RANK": str(place)} for place in range(slots[node])]


def device_environment(environment: Mapping[str, str], places: Sequence[int]) -> dict[str, str]:
    """The variable that shows only the devices at these places of those that ``environment`` shows."""
    name = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environment else "CUDA_VISIBLE_DEVICES"
    if name not in environment:
        return {name: ",".join(map(str, places))}
    shown = [each.strip() for each in environment[name].split(",")]
    if shown[0] in ("", "-1"):
        return {}  # none are, and none will be
    if max(places) >= len(shown):
        raise SystemExit(f"supervisor: {name}={environment[name]} shows {len(shown)} devices, --devices wants {places}")
    return {name: ",".join(shown[place] for place in places)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.jobs.supervisor", allow_abbrev=False)
    parser.add_argument("--lifeline", type=int, metavar="FD", help="a descriptor whose end is that of the command")
    parser.add_argument("--stdin", action="store_true", help="read all else as one line of JSON; stdin is the lifeline")
    parser.add_argument("--slots", type=_counts, help="ranks of every node: 4,4,2; 8x16 for 16 of 8")
    parser.add_argument("--devices", type=places_of, help="those of every node, by their places: 2,3/0,1")
    parser.add_argument("--node", default="0", help='which node this is, from 0; "slurm" asks SLURM_NODEID')
    parser.add_argument("--address", default=os.environ.get("MASTER_ADDR", "127.0.0.1"), help="of node 0")
    parser.add_argument("--port", default=os.environ.get("MASTER_PORT", "29500"), help="where rank 0 listens")
    parser.add_argument("command", nargs="*", help="behind --")
    options = parser.parse_args(argv)
    environment = dict(os.environ)
    if options.stdin:
        said = json.loads(_first_line(0))
        options = argparse.Namespace(**{**vars(options), **said["options"], "lifeline": 0})
        environment |= said["environment"]
        os.chdir(said["folder"])
    elif options.lifeline is not None:
        os.set_inheritable(options.lifeline, False)
    if options.slots is None:
        return Supervisor(lifeline=options.lifeline, deaf=False).run([(options.command, environment)])
    node = int(os.environ["SLURM_NODEID"] if options.node == "slurm" else options.node)
    nodes = os.environ["SLURM_STEP_NUM_NODES"] if options.node == "slurm" else len(options.slots)
    if int(nodes) != len(options.slots):
        print(f"supervisor: --slots names {len(options.slots)} nodes, the step has {nodes}", file=sys.stderr)
        return 2
    if options.devices is not None:
        environment |= device_environment(environment, options.devices[node])
    ranks = rank_environments(options.slots, node, options.address, options.port)
    supervisor = Supervisor(lifeline=options.lifeline, deaf=True)
    return supervisor.run([(options.command, environment | rank) for rank in ranks])


def _counts(text: str) -> list[int]:
    """``4,4,2``, or ``8x16`` for 16 nodes of 8."""
    parts = (part.partition("x") for part in text.split(","))
    return [count for ranks, _, nodes in parts for count in [int(ranks)] * int(nodes or 1)]


def split_command(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """What stands before and behind the first ``--``: argparse would take out a second one, which is the command's."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def places_of(text: str) -> list[list[int]]:
    """``2,3/0,1``: the third and fourth device of the first node, the first two of the second."""
    return [[int(place) for place in node.split(",")] for node in text.split("/")]


def _first_line(descriptor: int) -> bytes:
    """The first line and no byte more: the rest is for others."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            raise SystemExit("supervisor: stdin has ended")
        line += byte
    return line


if __name__ == "__main__":
    sys.exit(main())
