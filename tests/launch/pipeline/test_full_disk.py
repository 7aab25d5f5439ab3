"""A disk that fills up: one clear message, and nothing lost that was finished."""

import os
import subprocess
from pathlib import Path

import pytest

from reward.__main__ import main as train_reward
from rlhf.core.errors import DiskFull


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk: mounting one needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all but ``leave`` bytes of the disk."""
    path = folder / "filler"
    left = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    path.write_bytes(bytes(left - leave))
    return path


def test_a_run_that_cannot_save_says_so_and_goes_on_once_there_is_room(
    small_disk, tmp_path, tiny_model, tiny_pairs, capsys
):
    run = small_disk / "run"
    arguments = [
        f"output={run}",
        f"model.path={tiny_model}",
        f"data.train={tiny_pairs}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "engine.kind=local",
        "train.global_batch_size=16",
        "train.max_steps=4",
        "train.checkpoint_every=2",
        "train.keep_checkpoints=1",
        "train.evaluate_every=0",
        "train.tensorboard=false",
        "train.publish=none",
    ]
    filler = fill(small_disk, leave=700 * 1024)  # room for one checkpoint, and not for a second beside it
    assert train_reward(arguments) == 2
    said = capsys.readouterr().err
    assert f"{run}: the disk is full" in said and "What was finished before is intact" in said
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert not (run / "done.json").exists()
    filler.unlink()
    assert train_reward(arguments) == 0
    assert "resuming from" in capsys.readouterr().out and (run / "done.json").exists()


def test_a_pipeline_on_a_full_disk_says_so(toys, small_disk):
    toys.write({"a": {}}, output=str(small_disk / "out"))
    (small_disk / "out").mkdir()
    fill(small_disk, leave=0)
    with pytest.raises(DiskFull, match="the disk is full"):
        toys.run()
