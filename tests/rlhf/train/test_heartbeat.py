"""A rank that stands still is named by those that wait for it, and nobody waits an hour for one that never came."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from rlhf.train import heartbeat
from rlhf.train.heartbeat import Beat, waits_for

ROOT = Path(__file__).resolve().parents[3]
WORKER = """
import json, os, sys, time
from pathlib import Path
from rlhf.engine.ranks import start_ranks, stop_ranks
from rlhf.train import heartbeat
from rlhf.train.status import read_status, recording, report_phase
heartbeat.SECONDS_BETWEEN_BEATS, heartbeat.SECONDS_STILL = 0.1, 1.0
folder, behave = Path(sys.argv[1]), sys.argv[2]

def hangs():
    time.sleep(4)

with recording(folder, "toy"):
    ranks = start_ranks(60, 60)
    with heartbeat.heart_beating(ranks):
        report_phase("training")
        ranks.barrier()
        if ranks.rank == 1:
            report_phase("reading data")
            time.sleep(1)
            (folder / "pid").write_text(str(os.getpid()))
            hangs() if behave == "hang" else time.sleep(0.5)
        ranks.barrier()
    stop_ranks()
"""


def beat(**changes) -> Beat:
    return Beat(
        **{"host": "n1", "count": 5, "phase": "training", "place": "a.py:1 in f", "waits": True, "since": 100.0}
        | changes
    )


@pytest.mark.parametrize(
    ("beats", "silent", "said"),
    [
        ({0: beat(), 1: beat()}, {}, ""),
        ({0: beat(since=5), 1: beat(waits=False, since=5)}, {}, ""),
        ({0: beat(waits=False), 1: beat(waits=False)}, {}, ""),
        (
            {0: beat(), 1: beat(host="n2", waits=False, since=90)},
            {},
            "rank 1 on n2, for 90 s in: training (a.py:1 in f)",
        ),
        ({0: beat(waits=False, phase="reading data"), 1: beat()}, {}, "rank 0 on n1, for 100 s in: reading data (a.py"),
        ({0: beat(), 1: beat(), 2: beat(host="n3")}, {2: 75.0}, "rank 2 on n3, silent for 75 s, last in: training"),
        ({0: beat()}, {1: 61.0}, "rank 1, silent for 61 s"),
        ({0: beat(), **{rank: beat(waits=False) for rank in range(1, 8)}}, {}, " and 4 more"),
    ],
)
def test_those_are_named_that_others_wait_for_and_no_others(beats, silent, said):
    found = waits_for(beats, dict.fromkeys(beats, 0.0) | silent)
    assert said in found and bool(found) == bool(said)


@pytest.mark.dist
@pytest.mark.parametrize("behave", ["hang", "stop"])
def test_a_run_whose_rank_hangs_or_is_gone_says_which_one_and_in_which_phase(start_ranks, tmp_path, behave):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    folder = tmp_path / "run"
    processes = start_ranks([str(worker), str(folder), behave], 2)
    deadline = time.monotonic() + 120
    if behave == "stop":
        while not (folder / "pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(int((folder / "pid").read_text()), signal.SIGSTOP)
    said = ""
    while not said:
        assert time.monotonic() < deadline, processes[0].communicate()[0] if processes[0].poll() is not None else ""
        try:
            said = json.loads((folder / "status.json").read_text())["waits_for"]
        except (OSError, ValueError, KeyError):
            time.sleep(0.1)
    assert said.startswith("rank 1 on ") and "in: reading data" in said
    assert ("silent for" in said) == (behave == "stop")
    if behave == "stop":
        os.kill(int((folder / "pid").read_text()), signal.SIGCONT)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.dist
@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_ranks_that_never_meet_give_up_after_the_minutes_of_the_rendezvous(start_ranks, tmp_path, address):
    worker, rank = tmp_path / "worker.py", 0 if address == "127.0.0.1" else 1
    worker.write_text(
        f"import os; os.environ['RANK'] = '{rank}'\n"
        "from rlhf.core.errors import ConfigError\nfrom rlhf.engine.ranks import start_ranks\n"
        "try: start_ranks(3600, 3)\nexcept ConfigError as error: print('refused:', error)"
    )
    began = time.monotonic()
    (process,) = start_ranks([str(worker)], 1, WORLD_SIZE="2", MASTER_ADDR=address)
    said = process.communicate(timeout=100)[0]
    assert time.monotonic() - began < 60
    assert "refused: " in said and address in said


@pytest.mark.dist
def test_a_rank_that_meets_nobody_says_so_whichever_it_is(start_ranks, tmp_path):
    """Of ranks that have met, the first speaks for all."""
    words = ["model.path=m", "data.train=d", f"output={tmp_path}", "engine.rendezvous_minutes=0.02"]
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import os, sys; os.environ['RANK'] = '1'\nfrom reward.__main__ import main\nsys.exit(main({words}))"
    )
    (process,) = start_ranks([str(worker)], 1, WORLD_SIZE="2", MASTER_ADDR="no-such-host.invalid")
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 2
    assert "the ranks cannot meet at no-such-host.invalid:" in said and "no such host is known here" in said


def test_constants_leave_a_beat_time_to_arrive():
    assert heartbeat.SECONDS_STILL > 3 * heartbeat.SECONDS_BETWEEN_BEATS
