"""The end of a process that has done its work."""

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process as ``sys.exit(code)`` would, without taking the interpreter apart.

    While Python does that, a daemon thread of some library (a progress bar's, a writer's) that comes back from C++ is
    ended by unwinding its stack, which C++ answers with "terminate called without an active exception": a run that has
    finished would end with SIGABRT, now and then.
    """
    if "torch" not in sys.modules:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # nobody reads any more
    os._exit(code)
