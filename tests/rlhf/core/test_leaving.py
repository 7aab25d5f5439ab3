"""Processes end with the code of their work."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUSY = (
    "import atexit, sys, threading, time, torch\n"
    "from rlhf.core.leaving import leave\n"
    "def busy():\n"
    "    while True: torch.randn(300, 300) @ torch.randn(300, 300)\n"
    "def writes(): time.sleep(0.3); open('thread', 'w').close()\n"
    "threading.Thread(target=busy, daemon=True).start()\n"
    "threading.Thread(target=writes).start()\n"
    "atexit.register(lambda: open('atexit', 'w').close())\n"
    "time.sleep(0.2); print('done')\n"
)


@pytest.mark.parametrize("code", [0, 75])
def test_a_thread_that_computes_in_cpp_does_not_abort_a_process_that_is_done(tmp_path, code):
    """With sys.exit such a process ends with SIGABRT: "terminate called without an active exception"."""
    command = [sys.executable, "-c", f"{BUSY}leave({code})"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=None)
    assert (done.returncode, done.stdout, done.stderr) == (code, "done\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"thread", "atexit"}
