"""Checkpoints that cannot be converted, and what a conversion left that was cut off. Real ones: test_world_size.py."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from rlhf.core.errors import CheckpointError
from rlhf.engine import universal
from rlhf.engine.ranks import Ranks
from rlhf.engine.zero import TAG, ZeroEngine


@pytest.fixture
def checkpoint(tmp_path):
    """One that seems to be written on two ranks, and the place of what is converted."""
    folder = tmp_path / "step-00000002"
    (folder / TAG).mkdir(parents=True)
    for rank in range(2):
        (folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return folder


@pytest.fixture
def small_disk(checkpoint):
    """A disk of 3 MiB with that checkpoint on it."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(checkpoint)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk: mounting one needs root")
    (checkpoint / TAG).mkdir()
    yield checkpoint
    subprocess.run(["umount", "--lazy", str(checkpoint)], check=False)


def convert(folder: Path) -> None:
    universal._convert(folder / TAG, folder / universal.CONVERTED / TAG)


def failing(error: Exception):
    """A converter that breaks half-way."""

    def main(options) -> None:
        (Path(options.output_folder) / "half").write_text("done")
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nException raised from ..."),
    ],
)
def test_a_conversion_that_fails_names_the_checkpoint_and_leaves_nothing(checkpoint, monkeypatch, error):
    monkeypatch.setattr(universal.ds_to_universal, "main", failing(error))
    with pytest.raises(CheckpointError) as caught:
        convert(checkpoint)
    said = str(caught.value)
    assert said.startswith(f"{checkpoint} cannot be converted for another number of ranks: ")
    assert str(error).partition("\n")[0] in said and "Exception raised" not in said
    assert "MiB left" in said and "The checkpoint is as it was" in said
    assert [path.name for path in checkpoint.iterdir()] == [TAG]


def test_a_fault_of_the_converter_is_raised_as_it_is_and_leaves_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(universal.ds_to_universal, "main", failing(KeyError("param_shapes")))
    with pytest.raises(KeyError, match="param_shapes"):
        convert(checkpoint)
    assert [path.name for path in checkpoint.iterdir()] == [TAG]


def test_a_disk_that_torch_fills_up_is_a_failed_conversion_and_empty_again(small_disk, monkeypatch):
    free = os.statvfs(small_disk).f_bavail

    def main(options) -> None:
        torch.save(torch.zeros(2**20), Path(options.output_folder) / "fp32.pt")  # 4 MiB

    monkeypatch.setattr(universal.ds_to_universal, "main", main)
    with pytest.raises(CheckpointError, match=r"converted for another number of ranks: .* \(\d\.\d MiB left\)"):
        convert(small_disk)
    assert os.statvfs(small_disk).f_bavail == free


def test_what_a_killed_conversion_left_is_removed_by_a_run_on_the_ranks_of_the_checkpoint(checkpoint):
    (checkpoint / universal.CONVERTED / TAG).mkdir(parents=True)
    (checkpoint / universal.CONVERTED / TAG / "half").write_text("done")
    (checkpoint / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    seen = []

    def load_checkpoint(folder, tag, **options):
        seen.append((folder, tag, [path.name for path in checkpoint.iterdir()]))
        return folder, {}

    one = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    deepspeed = SimpleNamespace(load_checkpoint=load_checkpoint)
    schedule = LambdaLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), lambda step: 1.0)
    engine = SimpleNamespace(settings={}, stage=2, ranks=one, _has_frozen=False, _engine=deepspeed, _schedule=schedule)
    ZeroEngine.load(engine, checkpoint)
    assert seen == [(str(checkpoint), TAG, [TAG])]
