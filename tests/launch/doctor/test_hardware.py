import os
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from launch.doctor import hardware
from launch.doctor.finding import GIB, Subject
from rlhf.core.memory import HostMemory

WIDTH = 32
"""Width of the tiny model, and so the numbers of its head."""
TWO_GPUS = "echo '0, NVIDIA H100 80GB HBM3, 81559, 70000'; echo '1, NVIDIA H100 80GB HBM3, 81559, 4'"


def only(findings):
    (finding,) = findings
    return finding


# ---- devices


@pytest.fixture
def seen_by_torch(monkeypatch):
    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return see


def test_more_ranks_than_cores_are_a_warning_with_the_number_that_fits(seen_by_torch, no_programs):
    seen_by_torch(0)
    finding = only(hardware.devices(Subject(ranks=1000)))
    assert finding.status == "warning" and finding.remedy == f"--ranks {len(os.sched_getaffinity(0))}"
    assert only(hardware.devices(Subject(ranks=1))).status == "ok"


def test_gpus_that_torch_does_not_see_are_a_failure(seen_by_torch, program):
    seen_by_torch(0)
    program("nvidia-smi", TWO_GPUS)
    finding = only(hardware.devices(Subject()))
    assert finding.status == "failure" and "2 GPU(s) are here, torch sees none" in finding.text
    assert "install a torch build" in finding.remedy


def test_gpus_that_the_environment_hides_are_a_warning(seen_by_torch, program, monkeypatch):
    seen_by_torch(0)
    program("nvidia-smi", TWO_GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = only(hardware.devices(Subject()))
    assert finding.status == "warning" and "hides the 2 GPU(s)" in finding.text
    assert "unset CUDA_VISIBLE_DEVICES" in finding.remedy


def test_more_ranks_than_gpus_are_a_failure(seen_by_torch, program):
    seen_by_torch(2)
    program("nvidia-smi", TWO_GPUS)
    finding = only(hardware.devices(Subject(ranks=3)))
    assert (finding.status, finding.remedy) == ("failure", "--ranks 2")


def test_a_gpu_that_somebody_uses_is_a_warning_unless_the_run_does_not_see_it(seen_by_torch, program, monkeypatch):
    seen_by_torch(2)
    program("nvidia-smi", TWO_GPUS)
    busy, fine = hardware.devices(Subject())
    assert busy.status == "warning" and busy.text == "GPU 0: 68.4 GiB of 79.6 GiB are in use already"
    assert fine.status == "ok" and fine.text == "2 GPU(s): NVIDIA H100 80GB HBM3 (79.6 GiB)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    seen_by_torch(1)
    assert only(hardware.devices(Subject())).status == "ok"


# ---- host memory


@pytest.fixture
def free_memory(monkeypatch):
    def free(count: int) -> None:
        found = HostMemory(total=64 * GIB, free=count, limited=False)
        monkeypatch.setattr(hardware, "read_memory", lambda: found)

    return free


def test_a_model_that_the_host_cannot_load_is_a_failure(free_memory, stage, tiny_model):
    size = sum(each.numel() for each in _weights(tiny_model)) * 4
    free_memory(2 * size - 1)
    finding = only(hardware.host_memory(Subject(ranks=2, stages=(stage("engine.precision=float32"),))))
    assert finding.status == "failure" and finding.values["needed_bytes"] == 2 * size
    assert "2 rank(s) that load the model" in finding.text and "exit code -9" in finding.text
    assert "fewer ranks" in finding.remedy
    free_memory(2 * size)
    assert only(hardware.host_memory(Subject(ranks=2, stages=(stage("engine.precision=float32"),)))).status == "ok"


def test_offloaded_states_count(free_memory, stage, tiny_model):
    parameters = sum(each.numel() for each in _weights(tiny_model))
    free_memory(64 * GIB)

    def needed(name: str) -> int:
        settings = (f"engine.deepspeed={name}", "engine.precision=bfloat16")
        return only(hardware.host_memory(Subject(ranks=1, stages=(stage(*settings),)))).values["needed_bytes"]

    assert needed("zero2") == 2 * parameters
    assert needed("zero2_offload") == 12 * parameters
    assert needed("zero3_offload") == 14 * parameters


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()


def test_little_memory_is_a_warning_where_no_recipe_says_how_much_is_needed(free_memory):
    free_memory(GIB)
    finding = only(hardware.host_memory(Subject()))
    assert finding.status == "warning" and "1.0 GiB free, of this host" in finding.text and finding.remedy


def test_the_limit_of_a_container_counts_before_the_memory_of_its_host(monkeypatch):
    found = HostMemory(total=3 * GIB, free=2 * GIB, limited=True)
    monkeypatch.setattr(hardware, "read_memory", lambda: found)
    finding = only(hardware.host_memory(Subject()))
    assert finding.status == "warning" and "2.0 GiB free, up to the limit of this container" in finding.text


# ---- shared memory and disk


def test_little_shared_memory_is_a_warning_with_the_option_of_docker(small_disk, monkeypatch):
    monkeypatch.setattr(hardware, "SHARED_MEMORY", small_disk)
    finding = only(hardware.shared_memory(Subject()))
    assert finding.status == "warning" and "--shm-size=1g" in finding.remedy


def test_no_shared_memory_at_all_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "SHARED_MEMORY", tmp_path / "none")
    assert only(hardware.shared_memory(Subject())).status == "warning"


def test_a_full_disk_is_a_failure(small_disk):
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(8 * 2**20))
    finding = only(hardware.disk(Subject(output=small_disk / "runs" / "a")))
    assert finding.status == "failure" and "cannot be written to: No space left on device" in finding.text
    assert "output=FOLDER" in finding.remedy
    assert [each.name for each in small_disk.iterdir()] == ["filler"]


def test_a_disk_without_room_for_the_checkpoints_is_a_failure(small_disk, stage, tiny_model):
    parameters = sum(each.numel() for each in _weights(tiny_model))
    fits = stage(f"output={small_disk}/run", "train.keep_checkpoints=2")
    finding = only(hardware.disk(Subject(output=fits.config.output, stages=(fits,))))
    kept = 2 + 1 + 1  # the latest, the best, and one that is being written
    assert finding.status == "ok" and finding.values["needed_bytes"] == (16 * kept + 4) * (parameters + WIDTH)
    frozen = stage(f"output={small_disk}/run", "train.keep_checkpoints=2", "model.freeze_layers=3")
    finding = only(hardware.disk(Subject(output=fits.config.output, stages=(frozen,))))
    assert finding.values["needed_bytes"] < 16 * parameters
    (small_disk / "run" / "checkpoints").mkdir(parents=True)
    (small_disk / "run" / "checkpoints" / "state.pt").write_bytes(bytes(100_000))
    finding = only(hardware.disk(Subject(output=fits.config.output, stages=(fits,))))
    assert finding.values["needed_bytes"] == (16 * kept + 4) * (parameters + WIDTH) - 100_000, "what is there is there"
    many = stage(f"output={small_disk}/run", "train.keep_checkpoints=200")
    finding = only(hardware.disk(Subject(output=many.config.output, stages=(many,))))
    assert finding.status == "failure" and "not enough" in finding.text and "keep_checkpoints" in finding.remedy


def test_a_shape_that_no_plan_knows_is_counted_from_its_files(stage, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path / "gpt2")
    run = stage(f"output={tmp_path}/run", f"model.path={tmp_path}/gpt2", "train.keep_checkpoints=1")
    (finding,) = hardware.disk(Subject(output=run.config.output, stages=(run,)))
    parameters = sum(each.numel() for each in model.parameters())
    assert finding.values["needed_bytes"] == pytest.approx((16 * 2 + 4) * parameters, rel=0.05)


def test_little_room_without_a_recipe_is_a_failure_and_some_a_warning(tmp_path, monkeypatch):
    def status(free: float) -> str:
        monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return only(hardware.disk(Subject(output=tmp_path))).status

    assert [status(free) for free in (GIB / 2, 2 * GIB, 40 * GIB)] == ["failure", "warning", "ok"]


def test_a_file_where_the_run_folder_should_be_is_a_failure(tmp_path):
    (tmp_path / "file").touch()
    finding = only(hardware.disk(Subject(output=tmp_path / "file" / "run")))
    assert finding.status == "failure" and "Not a directory" in finding.text


def test_the_folder_of_offloaded_states_is_looked_at_too(small_disk, stage):
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(8 * 2**20))
    run = stage(f"engine.nvme_path={small_disk}", "engine.deepspeed=zero3_nvme")
    _, nvme = hardware.disk(Subject(output=run.config.output, stages=(run,)))
    assert nvme.status == "failure" and nvme.text.startswith(f"{small_disk}: cannot be written to")
