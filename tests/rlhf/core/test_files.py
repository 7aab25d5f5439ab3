"""Permissions of written files: those that the umask gives, whoever opened the file first."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.core.files import staged_directory, write_array, write_json, write_text
from rlhf.engine.checkpoint import CheckpointStore
from rlhf.engine.ranks import Ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027, 0o007], ids=lambda mask: f"umask {mask:03o}")
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_as_umask(root: Path, umask: int) -> None:
    paths = [root, *root.rglob("*")] if root.is_dir() else [root]
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        runs = path.is_dir() or mode & stat.S_IXUSR
        assert mode == (0o777 if runs else 0o666) & ~umask, f"{path}: {mode:o}"


def save_everything(folder: Path, model: Path) -> None:
    """What the libraries write: weights in shards, adapters, a tokenizer, private temporary files and folders."""
    hf = AutoModelForCausalLM.from_pretrained(model)
    hf.save_pretrained(folder / "sharded", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    save_file({"weight": torch.ones(3)}, folder / "one.safetensors")
    get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    private = Path(tempfile.mkdtemp(dir=folder))
    os.close(tempfile.mkstemp(dir=private)[0])
    torch.save({"step": 1}, folder / "state.pt")
    script = folder / "recover.py"
    script.write_text("print()\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)  # as DeepSpeed leaves one beside its checkpoints


def test_a_staged_folder_has_the_permissions_of_the_umask_whatever_was_saved_in_it(umask, tiny_model, tmp_path):
    with staged_directory(tmp_path / "final") as staged:
        save_everything(staged, tiny_model)
    assert len([*tmp_path.rglob("*.safetensors")]) > 3
    assert_as_umask(tmp_path / "final", umask)


def test_a_checkpoint_has_the_permissions_of_the_umask(umask, tiny_model, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", ALONE, keep=2)
    store.save(10, lambda folder: save_everything(folder, tiny_model))
    assert_as_umask(tmp_path / "checkpoints", umask)


@pytest.mark.parametrize("before", [None, 0o600, 0o666])
def test_a_file_has_the_permissions_of_the_umask_whatever_it_replaces(umask, tmp_path, before):
    writers = {
        "a.txt": lambda path: write_text(path, "text"),
        "a.json": lambda path: write_json(path, {"a": 1}),
        "a.npy": lambda path: write_array(path, np.zeros(2)),
    }
    for name, write in writers.items():
        path = tmp_path / "new" / name
        if before is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text("old")
            path.chmod(before)
        write(path)
    assert_as_umask(tmp_path / "new", umask)


def test_the_log_of_a_rank_has_the_permissions_of_the_umask(umask, tmp_path):
    command = "import pathlib, sys; from rlhf.train.output import print_to; print_to(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", command, str(tmp_path / "logs")], check=True)
    assert_as_umask(tmp_path / "logs", umask)


def test_a_shared_folder_hands_its_group_down(tmp_path):
    """The bit that gives new files the group of a project's folder stays where it was."""
    os.chmod(tmp_path, 0o2770)
    with staged_directory(tmp_path / "final") as staged:
        (staged / "inner").mkdir()
        save_file({"weight": torch.ones(3)}, staged / "inner" / "one.safetensors")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "final", tmp_path / "final" / "inner")]
    assert [mode & stat.S_ISGID for mode in modes] == [stat.S_ISGID] * 2


def test_two_processes_with_one_id_do_not_share_temporary_names(tmp_path, monkeypatch):
    """As in two containers on one disk."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with staged_directory(tmp_path / "cache") as first:
        (first / "a").write_text("first")
        with staged_directory(tmp_path / "cache") as second:
            assert second != first
        assert (first / "a").read_text() == "first"
