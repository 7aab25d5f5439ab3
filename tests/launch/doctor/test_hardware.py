import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from launch.doctor import hardware
from launch.doctor.subject import Subject
from launch.plan import cluster
from launch.plan.cluster import cluster_of
from launch.plan.planner import Request, plan_stage
from launch.runs import PipelineStage
from launch.screen import GIB
from launch.stages import STAGES
from rlhf.config import load_config
from rlhf.core.memory import HostMemory

WIDTH = 32
"""Width of the tiny model, and so the numbers of its head."""
TWO_GPUS = (
    "echo '0, GPU-8f1b-11, NVIDIA H100 80GB HBM3, 81559, 70000'; echo '1, GPU-90aa-22, NVIDIA H100 80GB HBM3, 81559, 4'"
)
THREE_KINDS = (
    "echo '0, GPU-8f1b-11, NVIDIA A100, 40960, 39000'; echo '1, GPU-90aa-22, NVIDIA H100, 81559, 4'; "
    "echo '2, GPU-90ab-33, NVIDIA L40, 46068, 4'"
)


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


@pytest.mark.parametrize(
    ("visible", "kinds", "busy"),
    [
        ("1,2", ["NVIDIA H100", "NVIDIA L40"], False),
        ("GPU-8f1b", ["NVIDIA A100"], True),
        ("GPU-90ab-33,0", ["NVIDIA L40", "NVIDIA A100"], True),
        ("MIG-GPU-90aa-22/1/0,MIG-GPU-90aa-22/2/0", ["NVIDIA H100"], False),
        ("MIG-5c1e-77", [], False),
        ("2,7,0", ["NVIDIA L40"], False),
    ],
)
def test_the_doctor_looks_at_the_gpus_that_the_run_will_have(seen_by_torch, program, monkeypatch, visible, kinds, busy):
    seen_by_torch(len(visible.split(",")))
    program("nvidia-smi", THREE_KINDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    *warnings, found = hardware.devices(Subject())
    assert [name for name in ("NVIDIA L40", "NVIDIA H100", "NVIDIA A100") if name in found.text] == sorted(
        kinds, key=["NVIDIA L40", "NVIDIA H100", "NVIDIA A100"].index
    )
    assert bool(warnings) == busy


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
    assert busy.status == "warning" and busy.text == "GPU 0: 68.36 GiB of 79.65 GiB are in use already"
    assert fine.status == "ok" and fine.text == "2 GPU(s): NVIDIA H100 80GB HBM3 (79.65 GiB)"
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


def planned(stage, ranks: int):
    """What ``rlhf plan`` says of a stage on this machine."""
    return plan_stage(stage.stage.name, stage.config, cluster_of(devices_per_node=ranks), Request())


def test_host_memory_is_what_the_plan_says(free_memory, stage):
    own = stage("engine.precision=float32")
    need = planned(own, 2).node_host_bytes
    free_memory(need - 1)
    finding = only(hardware.host_memory(Subject(ranks=2, stages=(own,))))
    assert finding.status == "failure" and finding.values["needed_bytes"] == need
    assert "reward takes" in finding.text and "2 rank(s)" in finding.text and "exit code -9" in finding.text
    assert "rlhf plan reward" in finding.remedy
    free_memory(need)
    assert only(hardware.host_memory(Subject(ranks=2, stages=(own,)))).status == "ok"


def test_stages_at_a_time_take_what_each_of_them_takes(free_memory, stage, tmp_path):
    """Memory of the host, and the folder of offloaded states; on other nodes it is that of others."""
    settings = ("engine.precision=float32", f"engine.nvme_path={tmp_path}", "engine.deepspeed=zero3_nvme")
    two = tuple(replace(stage(*settings), name=name) for name in ("left", "right"))
    need = planned(two[0], 2).node_host_bytes
    free_memory(2 * need - 1)
    beside = Subject(ranks=2, stages=two, together=(two,))
    finding = only(hardware.host_memory(beside))
    assert finding.status == "warning" and finding.values["together_bytes"] == 2 * need
    assert "left, right at a time take" in finding.text and "--parallel 1" in finding.remedy
    swapped = [[*hardware.disk(each)][-1].values["needed_bytes"] for each in (beside, Subject(ranks=2, stages=two))]
    assert swapped[0] == 2 * swapped[1] > 0
    for alone in (Subject(ranks=2, stages=two), Subject(hosts={"a": 2, "b": 2}, stages=two, together=(two,))):
        assert only(hardware.host_memory(alone)).status == "ok"
    free_memory(2 * need)
    assert only(hardware.host_memory(beside)).status == "ok"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sft", ("model.path=someone/Llama-3.2-1B", "engine.deepspeed=zero0")),
        ("reward", ("model.path=someone/Llama-3.2-1B", "engine.deepspeed=zero0")),
        ("preference", ("model.path=someone/Llama-3.2-1B", "reference.kind=live")),
        ("ppo", ("policy.path=someone/Llama-3.2-1B", "reward.path=[runs/a/final, runs/b/final]")),
    ],
)
def test_what_does_not_fit_by_the_plan_is_not_ready_for_the_doctor(free_memory, name, settings):
    """On a host of which the plan's need is one byte short: the doctor once counted the weights of one model alone."""
    given = ["output=o", "data.train=absent.jsonl", *settings]
    config = load_config(STAGES[name].config_class(), [], given, program="test")
    own = PipelineStage(stage=STAGES[name], config=config)
    plan = planned(own, 2)
    assert plan.node_host_bytes > 2 * 4 * plan.roles.main.model.total
    free_memory(plan.node_host_bytes - 1)
    finding = only(hardware.host_memory(Subject(ranks=2, stages=(own,))))
    assert finding.status == "failure" and finding.values["needed_bytes"] == plan.node_host_bytes


def test_every_model_of_ppo_counts(free_memory):
    free_memory(10**13)

    def needed(*settings: str) -> int:
        given = ["output=o", "data.train=absent.jsonl", "policy.path=llama-3.2-1b", *settings]
        config = load_config(STAGES["ppo"].config_class(), [], given, program="test")
        subject = Subject(ranks=1, stages=(PipelineStage(stage=STAGES["ppo"], config=config),))
        return only(hardware.host_memory(subject)).values["needed_bytes"]

    one, two = needed("reward.path=llama-3.2-1b"), needed("reward.path=[llama-3.2-1b, llama-3.2-1b]")
    assert two - one == pytest.approx(4 * 1_235_814_400, rel=0.01)
    watched = needed("reward.path=llama-3.2-1b", "watch.second.path=llama-3.2-1b")
    assert watched == two
    assert needed("reward.function=a:b", "advantage.estimator=reinforce_pp") < one - 4 * 1_235_814_400


def test_what_no_plan_can_be_made_of_is_a_warning_that_says_why(free_memory, stage):
    free_memory(64 * GIB)
    unknown, memory = hardware.host_memory(Subject(ranks=1, stages=(stage("model.path=some/model"),)))
    assert unknown.status == "warning" and "what reward takes is not known: model.path = some/model" in unknown.text
    assert "rlhf plan" in unknown.remedy
    assert memory.status == "ok"


@pytest.mark.parametrize(("memory", "status"), [(80 * GIB, "ok"), (8 * GIB, "failure")])
def test_device_memory_is_what_the_plan_says(monkeypatch, stage, memory, status):
    monkeypatch.setattr(cluster, "_gpus_here", lambda: ("NVIDIA H100 80GB HBM3", memory, 2))
    own = stage("model.path=someone/Llama-3.2-1B", "engine.precision=bfloat16")
    finding = only(hardware.device_memory(Subject(ranks=2, stages=(own,))))
    assert finding.status == status
    assert finding.values["needed_bytes"] == planned(own, 2).device_peak.device_bytes
    assert ("it does not fit" in finding.text) == (status == "failure")


def test_on_a_cpu_there_is_no_memory_of_devices(stage):
    assert [*hardware.device_memory(Subject(ranks=2, stages=(stage(),)))] == []


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()


def test_little_memory_is_a_warning_where_no_recipe_says_how_much_is_needed(free_memory):
    free_memory(GIB)
    finding = only(hardware.host_memory(Subject()))
    assert finding.status == "warning" and "1.00 GiB free, of this host" in finding.text and finding.remedy


def test_the_limit_of_a_container_counts_before_the_memory_of_its_host(monkeypatch):
    found = HostMemory(total=3 * GIB, free=2 * GIB, limited=True)
    monkeypatch.setattr(hardware, "read_memory", lambda: found)
    finding = only(hardware.host_memory(Subject()))
    assert finding.status == "warning" and "2.00 GiB free, up to the limit of this container" in finding.text


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


def test_a_model_with_other_names_for_its_sizes_is_planned_too(stage, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path / "gpt2")
    run = stage(f"output={tmp_path}/run", f"model.path={tmp_path}/gpt2", "train.keep_checkpoints=1")
    (finding,) = hardware.disk(Subject(output=run.config.output, stages=(run,)))
    parameters = sum(each.numel() for each in model.parameters())
    kept = 1 + 1 + 1  # the latest, the best, and one that is being written
    assert finding.values["needed_bytes"] == (16 * kept + 4) * (parameters + 16)


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
    _, nvme = hardware.disk(Subject(output=run.config.output, stages=(run,), ranks=2))
    assert nvme.values["needed_bytes"] == 2 * sum(each.nvme for each in planned(run, 2).states.values()) > 0
    assert nvme.status == "failure" and nvme.text.startswith(f"{small_disk}: cannot be written to")
