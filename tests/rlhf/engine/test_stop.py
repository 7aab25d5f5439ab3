import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from rlhf.core.errors import STOPPED_EXIT_CODE, RunStopped
from rlhf.engine.ranks import Ranks
from rlhf.engine.stop import STOP_FILE, StopRequests, noting_signals, process_started, sheltering_children

WORKER = str(Path(__file__).parent / "workers" / "stop.py")
ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored by the parent"])
def inherited(request):
    """How the parent left SIGUSR1."""
    before = signal.signal(signal.SIGUSR1, request.param)
    yield request.param
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_noted_and_its_handler_put_back(tmp_path, inherited):
    with noting_signals():
        requests = StopRequests(tmp_path, ALONE, None)
        assert requests.agreed() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # twice is once
        assert requests.agreed() == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == inherited
    with noting_signals():
        assert StopRequests(tmp_path, ALONE, None).agreed() is None, "a note outlived its run"


def test_a_sheltered_child_outlives_what_asks_its_parent_to_stop(tmp_path):
    with noting_signals():
        with sheltering_children():
            child = subprocess.Popen(["sleep", "0.5"])
        for number in (signal.SIGUSR1, signal.SIGTERM):
            child.send_signal(number)
            os.kill(os.getpid(), number)
        assert StopRequests(tmp_path, ALONE, None).agreed() is not None, "the parent no longer hears"
        assert child.wait() == 0


@pytest.fixture
def interruptible():
    """Handle SIGINT as Python does at its start, even where these tests run in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_control_c_still_interrupts(tmp_path, interruptible):
    with noting_signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_stop_file_is_honored_once_and_removed(tmp_path):
    requests = StopRequests(tmp_path, ALONE, None)
    (tmp_path / STOP_FILE).touch()
    with pytest.raises(RunStopped, match=f"stopped at step 3 of 9 by the file {tmp_path}/STOP; the same comm") as info:
        requests.check("at step 3 of 9")
    assert info.value.exit_code == STOPPED_EXIT_CODE == 75
    assert not (tmp_path / STOP_FILE).exists() and requests.agreed() is None


def test_a_stop_file_from_before_this_process_is_dropped_with_a_word(tmp_path, caplog):
    (tmp_path / STOP_FILE).touch()
    os.utime(tmp_path / STOP_FILE, (0, process_started() - 1))
    assert StopRequests(tmp_path, ALONE, None).agreed() is None
    assert "STOP is older than this process: removed" in caplog.text and not (tmp_path / STOP_FILE).exists()


def test_the_budget_is_counted_from_the_start_of_the_process(tmp_path):
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    minutes = (uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")) / 60
    assert StopRequests(tmp_path, ALONE, minutes + 0.1).agreed() is None
    assert StopRequests(tmp_path, ALONE, max(minutes - 0.1, 1e-9)).agreed().startswith("train.max_minutes = ")


@pytest.mark.dist
def test_one_rank_that_is_asked_stops_all(run_ranks, tmp_path):
    said = run_ranks([WORKER, str(tmp_path)])
    for output in said:
        agreed = [line for line in output.splitlines() if line.startswith("agreed")]
        assert agreed == ["agreed None", "agreed SIGTERM", f"agreed the file {tmp_path}/run/STOP"]
