import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.core.errors import ConfigError
from rlhf.engine.deepspeed_config import RunValues, lint, resolve, shipped_names
from rlhf.engine.deepspeed_files import read

RUN = RunValues(precision="bfloat16", gradient_clipping=1.0, world_size=4, hidden_size=100, nvme_path="/nvme")
ROOT = Path(__file__).parents[3]


def problems(source, run: RunValues = RUN) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(source, run)
    heading, *lines = str(caught.value).splitlines()
    assert heading.endswith(f": {len(lines)} problem{'s' * (len(lines) > 1)}")
    return [line.strip() for line in lines]


# ---- what is resolved


def test_the_shipped_configurations_are_one_per_stage_and_need():
    with_needs = ["zero2_offload", "zero3", "zero3_hpz", "zero3_nvme", "zero3_offload"]
    assert shipped_names() == ["zero0", "zero1", "zero2", *with_needs]
    assert shipped_names("frozen") == ["zero3", "zero3_offload"]


@pytest.mark.parametrize("name", shipped_names("frozen"))
def test_a_shipped_configuration_for_frozen_models_splits_weights_and_has_no_optimizer(name):
    zero = resolve(name, RUN, role="frozen")["zero_optimization"]
    assert zero["stage"] == 3 and "offload_optimizer" not in zero
    assert resolve(f"frozen_{name}", RUN) == resolve(name, RUN, role="frozen")


def test_a_secondary_partition_of_a_model_that_is_only_asked_is_refused():
    source = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert resolve(source, RUN)["zero_optimization"]["zero_hpz_partition_size"] == 2
    with pytest.raises(ConfigError, match="zero_hpz_partition_size = 2: DeepSpeed has it for models under training"):
        resolve(source, RUN, role="frozen")


def test_the_secondary_partition_is_as_large_as_a_node():
    def size(**sizes) -> int:
        return resolve("zero3_hpz", replace(RUN, **sizes))["zero_optimization"]["zero_hpz_partition_size"]

    assert size(world_size=16, local_size=8) == 8
    assert size(world_size=4) == 4


def test_states_go_to_the_folder_that_the_recipe_names():
    offload = resolve("zero3_nvme", replace(RUN, nvme_path="/local/disk"))["zero_optimization"]["offload_optimizer"]
    assert (offload["device"], offload["nvme_path"]) == ("nvme", "/local/disk")


def test_offload_to_disk_without_a_folder_is_refused_with_the_setting_to_make():
    (found,) = problems("zero3_nvme", replace(RUN, nvme_path=None))
    assert found == (
        'zero_optimization.offload_optimizer.nvme_path = "auto": set engine.nvme_path in the recipe to a folder on a '
        "local disk"
    )


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
            {"stage": 3, "offload_optimizer": {"device": "nvme"}},
            'offload_optimizer.device = "nvme": needs nvme_path',
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}},
            'offload_optimizer.device = "nvme": works at ZeRO stage 3, and the stage is 2',
        ),
        (
            {"stage": 3, "zero_hpz_partition_size": 3},
            "zero_hpz_partition_size = 3: does not divide the 4 ranks",
        ),
        (
            {"stage": 2, "zero_hpz_partition_size": 2},
            "zero_hpz_partition_size = 2: works at ZeRO stage 3, and the stage is 2",
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
    (found,) = problems({"comms_logger": {"enabled": "perhaps"}})
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


def test_every_key_that_stands_twice_is_named_with_its_place(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"steps_per_print": 5, "bf16": {"enabled": true, "enabled": true}, "steps_per_print": 6}')
    assert [line.split(":")[0] for line in problems(path)] == ["steps_per_print", "bf16.enabled"]


def test_comments_are_read_and_leave_no_trace(tmp_path):
    path = tmp_path / "commented.json"
    path.write_text(
        '{ // which stage\n  "zero_optimization": {"stage": 3,\n  /* where\n  to */ "offload_param": '
        '{"device": "nvme", "nvme_path": "/a//b/*c*/"}}\n}'
    )
    zero = resolve(path, RUN)["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_param"]["nvme_path"] == "/a//b/*c*/"


def test_faults_behind_comments_keep_their_line_and_column(tmp_path):
    path = tmp_path / "faulty.json"
    path.write_text('{ // one\n  /* two\n  three */ "zero_optimization": {,\n}')
    with pytest.raises(ConfigError, match="invalid JSON at line 3, column 34: "):
        resolve(path, RUN)


@pytest.mark.parametrize("name", ["train_zero2.json", "train_zero3_nvme.json"])
def test_deepspeed_itself_reads_the_commented_files(name):
    import hjson

    text = (ROOT / "ds_configs" / name).read_text()
    assert "//" in text
    assert hjson.loads(text) == read(ROOT / "ds_configs" / name)[1]


def test_a_missing_file_and_an_unknown_name_are_refused():
    with pytest.raises(ConfigError, match=r"no/such.json: cannot be read: No such file"):
        resolve("no/such.json", RUN)
    with pytest.raises(
        ConfigError, match=r"zero4: no such DeepSpeed configuration \(shipped: zero0, zero1, "
    ):
        resolve("zero4", RUN)


# ---- without a run: the linter


# As documentation and repositories show them, shortened where they repeat themselves.
TRANSFORMERS_ZERO3 = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
DEEPSPEED_CHAT = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 10,
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "none"},
        "offload_optimizer": {"device": "none"},
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 3e7,
        "stage3_prefetch_bucket_size": 3e7,
        "memory_efficient_linear": False,
    },
    "fp16": {"enabled": True, "loss_scale_window": 100},
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "hybrid_engine": {
        "enabled": True,
        "max_out_tokens": 512,
        "inference_tp_size": 1,
        "release_inference_cache": False,
        "pin_parameters": True,
        "tp_gather_partition_size": 8,
    },
}
OPENRLHF = {
    "steps_per_print": 100,
    "zero_optimization": {
        "stage": 2,
        "offload_param": {"device": "none"},
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "sub_group_size": "auto",
        "stage3_max_live_parameters": "auto",
        "stage3_max_reuse_distance": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "reduce_bucket_size": "auto",
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
    },
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "data_types": {"grad_accum_dtype": "fp32"},
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 128,
}


def starts(lines) -> list[str]:
    return [line.split(" = ")[0].split(":")[0] for line in lines]


@pytest.mark.parametrize("role", ["train", "frozen"])
def test_shipped_configurations_pass_the_linter(role):
    for name in shipped_names(role):
        found = lint(name, role)
        assert found.problems == (), name
        assert bool(found.conditions) == (name == "zero3_nvme"), name


def test_a_configuration_of_the_transformers_trainer_lacks_only_what_the_recipe_has():
    found = lint(TRANSFORMERS_ZERO3)
    assert starts(found.problems) == ["optimizer", "scheduler"]
    assert "optim.learning_rate" in found.problems[0] and "optim.schedule" in found.problems[1]
    without = {key: value for key, value in TRANSFORMERS_ZERO3.items() if key not in ("optimizer", "scheduler")}
    assert lint(without).problems == lint(without).conditions == ()
    assert resolve(without, RUN)["zero_optimization"]["reduce_bucket_size"] == 10_000


def test_a_configuration_of_deepspeed_chat_is_listed_with_the_settings_that_take_its_place():
    found = lint(DEEPSPEED_CHAT)
    assert starts(found.problems) == ["train_batch_size", "hybrid_engine", "train_micro_batch_size_per_gpu"]
    assert "train.global_batch_size" in found.problems[0]
    assert "train.micro_batch_tokens" in found.problems[2]
    assert found.conditions == ("engine.precision=float16", "optim.max_grad_norm=1.0")


def test_a_configuration_of_openrlhf_is_listed_with_the_autos_that_only_its_own_code_fills():
    found = lint(OPENRLHF)
    assert starts(found.problems) == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_optimization.sub_group_size",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
    ]
    assert all("give a value or leave it out" in line for line in found.problems[2:])


def test_what_a_run_has_saved_passes_for_runs_like_it():
    found = lint(resolve("zero2", RUN))
    assert found.problems == ()
    assert found.conditions == ("engine.precision=bfloat16", "optim.max_grad_norm=1.0", "4 rank(s)")


def test_an_unused_feature_that_is_left_to_the_trainer_is_dropped():
    source = {"amp": {"enabled": "auto", "opt_level": "auto"}, "elasticity": {"enabled": False}}
    assert lint(source).problems == ()
    assert "amp" not in resolve(source, RUN) and "elasticity" not in resolve(source, RUN)
    assert starts(lint({"amp": {"enabled": True}, "elasticity": {"enabled": True}}).problems) == ["amp", "elasticity"]


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ((64, 6, 4), "no multiple of train_micro_batch_size_per_gpu 6 x gradient_accumulation_steps 4"),
        ((65, 2, None), "no multiple of train_micro_batch_size_per_gpu 2; DeepSpeed would refuse it on any number"),
    ],
)
def test_a_batch_that_no_number_of_ranks_gives_is_named(batch, problem):
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    source = {key: value for key, value in zip(keys, batch, strict=True) if value is not None}
    assert any(problem in line for line in lint(source).problems)
    assert any(problem in line for line in problems(source))


def test_a_batch_that_the_ranks_of_the_run_do_not_give_is_named():
    source = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4}
    line = "train_batch_size = 64: train_micro_batch_size_per_gpu 8 x gradient_accumulation_steps 4 x 4 ranks is 128"
    assert line in problems(source)
    assert not any("ranks is" in line for line in lint(source).problems)


def test_both_half_precisions_are_named_by_the_linter():
    found = lint({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    assert any("one precision at a time" in line for line in found.problems)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown = "yes": expected true or false'),
        ({"prescale_gradients": 1}, "prescale_gradients = 1: expected true or false"),
        ({"steps_per_print": "ten"}, 'steps_per_print = "ten": expected a number'),
        ({"gradient_predivide_factor": True}, "gradient_predivide_factor = true: expected a number"),
        ({"zero_optimization": {"stage": "three"}}, 'zero_optimization.stage = "three": Input should be'),
        (
            {"activation_checkpointing": {"partition_activation": True}},
            "activation_checkpointing.partition_activation = true: unknown key (did you mean partition_activations?)",
        ),
        ({"aio": {"blocksize": 1}}, "aio.blocksize = 1: unknown key (did you mean block_size?)"),
        ({"aio": {"block_size": "1M"}}, 'aio.block_size = "1M": expected a number'),
        ({"aio": []}, "aio = []: expected a section"),
    ],
)
def test_values_and_keys_that_deepspeed_would_swallow_are_named(source, problem):
    assert lint(source).problems[0].startswith(problem)


# ---- in DeepSpeed itself

TRAIN = """
import json, torch, deepspeed
from rlhf.engine.deepspeed_config import RunValues, resolve

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes
deepspeed.init_distributed("gloo")
run = RunValues(precision="float32", gradient_clipping=0.05, world_size=1, hidden_size=16)
names = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload"]
inputs, targets = torch.randn(12, 16), torch.randn(12, 1)
losses = {}
for name in names:
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
    # zero3_nvme has a test of its own in test_engines.py: it needs libaio.
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
    assert sorted({*losses, "zero3_nvme"}) == shipped_names()
    assert losses["zero0"][0] > losses["zero0"][1] > losses["zero0"][2]
    for name in losses:
        assert losses[name] == pytest.approx(losses["zero0"], rel=1e-5), name


@pytest.mark.parametrize(
    ("source", "precision", "expected"),
    [
        ("zero0", "bfloat16", None),
        ("zero1", "bfloat16", None),
        ("zero2", "bfloat16", "fp32"),
        ("zero2_offload", "bfloat16", None),
        ("zero3", "bfloat16", "fp32"),
        ("zero3_offload", "bfloat16", "fp32"),
        ("zero2", "float32", None),
        ("zero3", "float16", None),
        ({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}, "bfloat16", "bf16"),
        ({"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "auto"}}, "bfloat16", "fp32"),
    ],
    ids=str,
)
def test_gradients_are_added_up_in_float32_where_deepspeed_can(source, precision, expected):
    found = resolve(source, replace(RUN, precision=precision))["data_types"]["grad_accum_dtype"]
    assert found == expected
