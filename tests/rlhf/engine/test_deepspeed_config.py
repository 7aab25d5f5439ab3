import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.core.errors import ConfigError
from rlhf.engine.deepspeed_config import RunValues, resolve, shipped_names

RUN = RunValues(precision="bfloat16", gradient_clipping=1.0, world_size=4, hidden_size=100)
ROOT = Path(__file__).parents[3]


def problems(source, run: RunValues = RUN) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(source, run)
    heading, *lines = str(caught.value).splitlines()
    assert heading.endswith(f": {len(lines)} problem{'s' * (len(lines) > 1)}")
    return [line.strip() for line in lines]


# ---- what is resolved


def test_the_shipped_configurations_are_one_per_stage_with_and_without_offload():
    assert shipped_names() == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_configuration_resolves_without_any_auto_left(name, precision):
    resolved = resolve(name, replace(RUN, precision=precision))
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["zero_optimization"]["stage"] == int(name[4])
    assert resolved["bf16"]["enabled"] is (precision == "bfloat16")
    assert resolved["fp16"]["enabled"] is (precision == "float16")


def test_the_run_decides_batch_clipping_and_optimizer():
    resolved = resolve("zero2", replace(RUN, gradient_clipping=0.25))
    assert resolved["gradient_clipping"] == 0.25
    assert resolved["train_micro_batch_size_per_gpu"] == resolved["gradient_accumulation_steps"] == 1
    assert resolved["train_batch_size"] == 4
    assert resolved["zero_allow_untested_optimizer"] is True
    assert resolved["zero_force_ds_cpu_optimizer"] is False
    assert "optimizer" not in resolved and "scheduler" not in resolved


def test_zero3_buckets_follow_the_width_of_the_model():
    zero = resolve("zero3", RUN)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000


def test_deepspeed_is_kept_quiet_unless_the_json_says_otherwise():
    assert resolve("zero1", RUN)["log_level"] == "warning"
    assert resolve("zero1", RUN)["steps_per_print"] >= 10**9
    loud = resolve({"steps_per_print": 10, "log_level": "info"}, RUN)
    assert (loud["steps_per_print"], loud["log_level"]) == (10, "info")


def test_the_source_is_left_as_it_was():
    source = {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    resolve(source, RUN)
    assert source == {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}


def test_resolving_a_resolved_configuration_changes_nothing():
    for name in shipped_names():
        assert resolve(resolve(name, RUN), RUN) == resolve(name, RUN)


def test_values_equal_to_those_of_the_run_are_accepted():
    source = {"gradient_clipping": 1, "bf16": {"enabled": True}, "train_batch_size": 4}
    assert resolve(source, RUN)["bf16"]["enabled"] is True


def test_the_auto_that_deepspeed_itself_understands_is_kept():
    config = resolve({"data_types": {"keep_in_fp32_modules": "auto"}}, RUN)
    assert config["data_types"]["keep_in_fp32_modules"] == "auto"


def test_a_json_of_ones_own_is_read_from_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    for source in ("mine.json", "./mine.json", Path("mine.json")):
        assert resolve(source, RUN)["zero_optimization"]["stage"] == 1


# ---- what is refused


def test_all_contradictions_of_the_run_are_listed_at_once():
    source = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "gradient_allreduce_op": "sum",
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "torch_autocast": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "zero_force_ds_cpu_optimizer": True,
    }
    found = problems(source)
    assert len(found) == 11
    for expected in [
        "optimizer: the run builds its own optimizer; remove this section",
        "scheduler: the run builds its own scheduler; remove this section",
        'train_batch_size = 64: expected 4 or "auto" (',
        'train_micro_batch_size_per_gpu = 8: expected 1 or "auto" (micro-batches are packed by tokens',
        'gradient_accumulation_steps = 2: expected 1 or "auto" (micro-batches are packed by tokens',
        'gradient_clipping = 0.5: expected 1.0 or "auto" (',
        'gradient_allreduce_op = "sum": expected "mean" or "auto" (',
        'bf16.enabled = false: expected true or "auto" (the run\'s precision is bfloat16)',
        'fp16.enabled = true: expected false or "auto" (the run\'s precision is bfloat16)',
        'torch_autocast.enabled = true: expected false or "auto" (',
        'zero_force_ds_cpu_optimizer = true: expected false or "auto" (',
    ]:
        assert any(line.startswith(expected) for line in found), expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_bf16_and_fp16_together_are_refused_at_any_precision(precision):
    both = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
    assert problems(both, replace(RUN, precision=precision))


def test_true_does_not_pass_for_one():
    assert problems({"gradient_accumulation_steps": True})[0].startswith("gradient_accumulation_steps = true")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation = {}: unknown key (did you mean zero_optimization?)"),
        (
            {"zero_optimization": {"reduce_bucket_sise": 1}},
            "zero_optimization.reduce_bucket_sise = 1: unknown key (did you mean reduce_bucket_size?)",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}},
            "zero_optimization.stage3_prefetch_bucket = 1: unknown key "
            "(did you mean stage3_prefetch_bucket_size?)",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            "zero_optimization.offload_optimizer.pin_memry = true: unknown key (did you mean pin_memory?)",
        ),
        (
            {"bf16": {"enabled": "auto", "imediate_grad_update": True}},
            "bf16.imediate_grad_update = true: unknown key (did you mean immediate_grad_update?)",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(source, problem):
    assert problems(source) == [problem]


def test_a_deprecated_key_is_refused_with_its_successor():
    found = problems({"zero_optimization": {"stage": 2, "cpu_offload": True}})
    assert found == ["zero_optimization.cpu_offload = true: deprecated in DeepSpeed, use offload_optimizer"]


def test_an_auto_that_nothing_resolves_is_named_by_its_path():
    source = {"zero_optimization": {"stage": "auto", "sub_group_size": "auto"}, "aio": {"block_size": "auto"}}
    assert [line.split(" = ")[0] for line in problems(source)] == [
        "zero_optimization.stage",
        "zero_optimization.sub_group_size",
        "aio.block_size",
    ]


def test_zero3_buckets_without_a_known_width_are_refused():
    found = problems("zero3", replace(RUN, hidden_size=None))
    assert len(found) == 3 and all("the hidden size of the model is not known" in line for line in found)


@pytest.mark.parametrize(
    ("zero", "problem"),
    [
        ({"stage": 3, "offload_param": {"device": "nvme"}}, 'offload_param.device = "nvme": needs nvme_path'),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme"}},
            'offload_optimizer.device = "nvme": needs nvme_path',
        ),
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            'offload_param.device = "cpu": works at ZeRO stage 3',
        ),
        (
            {"stage": 0, "offload_optimizer": {"device": "cpu"}},
            'offload_optimizer.device = "cpu": works at ZeRO stage 1 or 2 or 3, and the stage is 0',
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            ": Assertion failed, Partial offloading only supported for ZeRO Stage 3.",
        ),
        ({"offload_param": {"device": "auto"}}, 'offload_param.device = "auto": nothing in the run'),
        ({"stage": "auto", "offload_param": {"device": "cpu"}}, 'stage = "auto": nothing in the run'),
        ({"stage": 4}, "stage = 4: Input should be 0, 1, 2"),
        ({"reduce_bucket_size": 0}, "reduce_bucket_size = 0: Input should be greater than 0"),
        (
            {"stage": 2, "offload_optimizer": {"device": "disk"}},
            'offload_optimizer.device = "disk": Input should',
        ),
    ],
)
def test_zero_settings_that_deepspeed_ignores_or_stumbles_over_are_refused(zero, problem):
    (found,) = problems({"zero_optimization": zero})
    assert found.removeprefix("zero_optimization").removeprefix(".").startswith(problem)


def test_what_only_deepspeed_knows_to_be_wrong_is_refused_in_its_words():
    assert problems({"communication_data_type": "fp8"})[0].startswith(
        "refused by DeepSpeed: Invalid communication"
    )
    assert problems({"sparse_gradients": True})[0].startswith("refused by DeepSpeed: ")


def test_faults_in_sections_that_only_deepspeed_reads_take_one_line_each():
    (found,) = problems({"compile": {"x": 1}})
    assert found == "refused by DeepSpeed: CompileConfig.x = 1: Extra inputs are not permitted"
    (found,) = problems({"data_types": 5})
    assert found.startswith("refused by DeepSpeed: ")


def test_a_section_that_is_no_mapping_is_refused():
    assert problems({"zero_optimization": True, "bf16": True}) == [
        "zero_optimization = true: expected a section",
        "bf16 = true: expected a section",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{\n  "zero_optimization": {,\n}', "bad.json: invalid JSON at line 2, column 25: "),
        ('{"bf16": {"enabled": true, "enabled": false}}', "bad.json: Duplicate keys in DeepSpeed config"),
        ("[1]", "bad.json: expected a JSON object, found [1]"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_name_and_line(
    text, problem, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve("bad.json", RUN)
    assert str(caught.value).startswith(problem)


def test_a_missing_file_and_an_unknown_name_are_refused():
    with pytest.raises(ConfigError, match=r"no/such.json: cannot be read: No such file"):
        resolve("no/such.json", RUN)
    with pytest.raises(
        ConfigError, match=r"zero4: no such DeepSpeed configuration \(shipped: zero0, zero1, "
    ):
        resolve("zero4", RUN)


# ---- in DeepSpeed itself

TRAIN = """
import json, torch, deepspeed
from rlhf.engine.deepspeed_config import RunValues, resolve, shipped_names

torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
run = RunValues(precision="float32", gradient_clipping=0.05, world_size=1, hidden_size=16)
inputs, targets = torch.randn(12, 16), torch.randn(12, 1)
losses = {}
for name in shipped_names():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=resolve(name, run))
    assert engine.zero_optimization_stage() == int(name[4]), name
    losses[name] = []
    for micro_batches in (1, 3, 2):  # as many as the tokens of a batch need
        for part in range(micro_batches):
            rows = slice(part, None, micro_batches)
            engine.set_gradient_accumulation_boundary(part == micro_batches - 1)
            engine.backward(((engine(inputs[rows]) - targets[rows]) ** 2).sum() / 12)
        engine.step()
        losses[name].append(float(((engine(inputs) - targets) ** 2).mean()))
print("LOSSES " + json.dumps(losses))
"""


@pytest.mark.dist
def test_deepspeed_trains_alike_with_every_shipped_configuration():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
    losses = json.loads(line.removeprefix("LOSSES "))
    assert sorted(losses) == shipped_names()
    assert losses["zero0"][0] > losses["zero0"][1] > losses["zero0"][2]
    for name in shipped_names():
        assert losses[name] == pytest.approx(losses["zero0"], rel=1e-5), name
