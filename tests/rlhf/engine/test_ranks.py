import os
from pathlib import Path

import pytest
import torch

from rlhf.core.errors import ConfigError
from rlhf.engine.ranks import single_rank, start_ranks, stop_ranks

WORKERS = Path(__file__).parent / "workers"


@pytest.mark.dist
def test_two_ranks_gather_agree_and_fail_together(run_ranks):
    run_ranks([str(WORKERS / "talk.py")], 2)


@pytest.mark.dist
def test_an_error_of_one_ranks_disk_is_everybodys_at_once(run_ranks, tmp_path):
    """In checksums of a checkpoint, in the log of metrics, and in that of skipped steps."""
    run_ranks([str(WORKERS / "broken_disk.py"), str(tmp_path)], 2)


def test_srun_without_a_meeting_point_says_what_to_export(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"export MASTER_ADDR=\$\(scontrol"):
        start_ranks()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR=''"),
        ({"MASTER_ADDR": "here", "MASTER_PORT": None}, "MASTER_PORT=''"),
        ({"RANK": "one"}, "RANK='one'"),
        ({"LOCAL_RANK": "", "MASTER_PORT": "http"}, "LOCAL_RANK='', MASTER_PORT='http'"),
    ],
)
def test_a_launcher_that_does_not_say_enough_is_named_with_what_is_missing(monkeypatch, changes, said):
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (given | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"are set, and {said}: expected an address and numbers"):
        start_ranks()


def test_a_run_in_this_process_leaves_no_rank_to_what_it_starts_afterwards(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    before = dict(os.environ)
    assert start_ranks().world_size == 1
    assert os.environ["RANK"] == "0"
    stop_ranks()
    assert dict(os.environ) == before


def test_attention_on_a_gpu_has_kernels_for_any_shape(monkeypatch):
    """A stand-in for a GPU: cuDNN's attention, which builds a plan for each new shape, is switched off there only."""
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked := [].append)
    assert single_rank().device.type == "cpu" and not asked.__self__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert single_rank().device == torch.device("cuda", 0) and asked.__self__ == [False]
