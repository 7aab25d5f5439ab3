"""``python zygote.py FD``: a process that has imported every stage, and forks a rank of a run whenever it is asked to.

Importing is what takes long when a rank starts: 5 of 6 CPU seconds. A fork begins where this process is, which
therefore does nothing but import: one thread, no process group, no random number drawn. tests/forked.py asks it,
over the socket ``FD``: a message for every rank, with two descriptors. The rank prints to the first; to the second
go its process id and, once it has ended, its exit code and its CPU seconds.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rlhf", "reward", "policy")
IMPORTED_LATE = ("deepspeed", "torch._inductor.compile_fx", "torch.utils.tensorboard")
"""What libraries would import in every rank, long after it has started."""
MESSAGE_BYTES = 2**18
STARTED, ENDED = struct.Struct("i"), struct.Struct("id")


def main() -> None:
    installed = sys.path[1 + len(_python_path()) :]
    sys.path[0] = str(ROOT)
    _import_everything()
    gc.collect()
    gc.freeze()  # collecting in a rank would write to every page that it shares
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        _become(request, installed)


def _import_everything() -> None:
    # Where it is installed, POT and Transformers import it, it pandas, and that pyarrow, which starts a thread.
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ModuleNotFoundError):  # of a library that is optional
                    importlib.import_module(module.name)


def _serve(asked: socket.socket) -> dict | None:
    """Fork what is asked for. Returns in each fork, with what it shall be, and ``None`` when nobody asks any more."""
    told: dict[int, int] = {}
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the line below hears of it
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # this process ends with the tests, not before them
    while True:
        ready, _, _ = select.select([asked, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_who_ended(told)
        if asked in ready:
            message, descriptors, _, _ = socket.recv_fds(asked, MESSAGE_BYTES, 2)
            if not message:
                return None
            output, story = descriptors
            threads = len(os.listdir("/proc/self/task"))
            assert threads == 1, f"{threads} threads: one that is not there after a fork may have held a lock"
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number in (1, 2):
                    os.dup2(output, number)
                for number in (output, story, woken, wake, *told.values()):
                    os.close(number)
                asked.close()
                return json.loads(message)
            os.close(output)
            told[child] = story
            os.write(story, STARTED.pack(child))


def _tell_who_ended(told: dict[int, int]) -> None:
    while told:
        child, status, used = os.wait4(-1, os.WNOHANG)
        if child == 0:
            return
        story = told.pop(child)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for this one
            os.write(story, ENDED.pack(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
        os.close(story)


def _become(request: dict, installed: list[str]) -> None:
    """Be ``python arguments`` in that environment and folder, up to the end of the process."""
    # Every process starts with random numbers of its own; Python's module sees to that by itself.
    sys.modules["torch"].seed()
    sys.modules["numpy"].random.seed()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    first, *rest = request["arguments"]
    if first == "-m":
        module, *rest = rest
        sys.path[:] = [request["folder"], *_python_path(), *installed]
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [str(Path(first).resolve().parent), *_python_path(), *installed]
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _python_path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


if __name__ == "__main__":
    main()
