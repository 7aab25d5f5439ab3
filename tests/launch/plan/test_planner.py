"""Whole plans: what must hold whatever the numbers are."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import BertConfig

from launch.plan.advice import next_knob, smallest_config
from launch.plan.cluster import Cluster, cluster_of, parse_bytes
from launch.plan.models import Sources
from launch.plan.planner import Request, checkpoint_bytes, plan_stage
from launch.plan.shortage import advice
from launch.plan.times import run_seconds, step_seconds
from launch.screen import gib
from launch.stages import STAGES, training
from rlhf.config import load_config
from rlhf.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "launch" / "recipes"


def h100(nodes=1, devices=8, **changes) -> Cluster:
    found = cluster_of(
        nodes=nodes,
        devices_per_node=devices,
        device="h100-80gb",
        device_memory=None,
        host_memory=None,
        flops=None,
        utilization=0.4,
    )
    return replace(found, **changes)


def config_of(stage, *overrides):
    needed = {
        "sft": ("model.path=llama-3-8b", "data.train=absent.jsonl"),
        "reward": ("model.path=llama-3-8b", "data.train=absent.jsonl"),
        "preference": ("model.path=llama-3-8b", "data.train=absent.jsonl"),
        "ppo": ("policy.path=llama-3-8b", "reward.path=llama-3-8b", "data.train=absent.jsonl"),
    }[stage]
    settings = ["output=runs/x", *needed, *overrides]
    return load_config(STAGES[stage].config_class(), [], settings, program="test")


def planned(stage, *overrides, cluster=None, **request):
    request = {"rows": 256, "mean_tokens": 400.0} | request
    return plan_stage(stage, config_of(stage, *overrides), cluster or h100(), Request(**request))


def peak(*arguments, **options) -> int:
    return planned(*arguments, **options).device_peak.device_bytes


@pytest.mark.parametrize("stage", training())
def test_more_ranks_never_need_more_on_each_under_zero3(stage):
    peaks = [peak(stage, "engine.deepspeed=zero3", cluster=h100(nodes)) for nodes in (1, 4)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("stage", training())
def test_offloading_moves_bytes_from_the_device_to_the_host(stage):
    here, away = (planned(stage, f"engine.deepspeed={name}") for name in ("zero2", "zero2_offload"))
    assert away.device_peak.device_bytes < here.device_peak.device_bytes
    assert away.host_peak.host_bytes > here.host_peak.host_bytes


@pytest.mark.parametrize("stage", ["sft", "reward", "preference"])
def test_checkpointing_and_smaller_micro_batches_need_less(stage):
    whole = peak(stage, "engine.deepspeed=zero3")
    assert peak(stage, "engine.deepspeed=zero3", "model.gradient_checkpointing=true") < whole
    assert peak(stage, "engine.deepspeed=zero3", "train.micro_batch_tokens=2048") < whole


def test_eager_attention_needs_more_and_lora_less():
    plain = peak("sft", "engine.deepspeed=zero2")
    assert peak("sft", "engine.deepspeed=zero2", "model.lora={rank: 16}") < plain
    eager = ("engine.deepspeed=zero2", "model.attention=eager")
    assert peak("sft", *eager) == plain, "packed rows attend by FlexAttention on a GPU"
    buckets = 'train.packing="off"'
    assert peak("sft", *eager, buckets) > peak("sft", "engine.deepspeed=zero2", buckets)


def test_encoders_are_planned_in_the_length_buckets_that_they_are_computed_in(tmp_path):
    settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertConfig(**settings).save_pretrained(tmp_path)
    found = planned("reward", f"model.path={tmp_path}", "model.attention=sdpa", "engine.deepspeed=zero2")
    off = planned("reward", f"model.path={tmp_path}", "engine.deepspeed=zero2", 'train.packing="off"')
    assert found.layout == "buckets" and found.batches == off.batches
    assert planned("reward", "engine.deepspeed=zero2").layout == "flex"


def test_frozen_layers_and_fewer_layers_need_less():
    plain = peak("reward", "engine.deepspeed=zero2")
    assert peak("reward", "engine.deepspeed=zero2", "model.freeze_layers=16") < plain
    assert peak("reward", "engine.deepspeed=zero2", "model.layers=16") < plain


def test_a_live_reference_stays_and_a_cached_one_goes():
    cached = planned("preference", "reference.path=llama-3-8b")
    live = planned("preference", "reference.kind=live")
    extra = 2 * live.roles.main.model.total

    def training(plan):
        return max(each.device_bytes for each in plan.phases if "backward" in each.name)

    assert training(live) - training(cached) == pytest.approx(extra * 1.05, rel=1e-3)
    assert "reference: forward pass" in [each.name for each in cached.phases]
    own = planned("preference")
    assert [role.name for role in own.roles.all] == ["policy", "reference"]
    assert own.states["reference"].device == {}
    assert [role.name for role in planned("preference", "loss.kind=simpo").roles.all] == ["policy"]
    adapters = planned("preference", "reference.kind=live", "model.lora={rank: 4}")
    assert adapters.states["reference"].device == {}


def test_ppo_has_all_its_models_at_once():
    plan = planned("ppo", "engine.deepspeed=zero3", "rollout.samples=2")
    assert [role.name for role in plan.roles.all] == ["policy", "critic", "reward model", "reference"]
    update = next(each for each in plan.phases if each.name == "policy: optimizer step")
    whole = 2 * plan.roles.main.model.total
    assert update.device["reference: weights"] == update.device["rollout: copy of the policy"] == whole
    shared = planned("ppo", "policy.lora={rank: 8}", "critic.share_trunk=true")
    critic = next(role for role in shared.roles.all if role.name == "critic")
    assert critic.model.total == shared.roles.main.model.trainable + 4096
    with pytest.raises(ConfigError, match=r"critic.share_trunk does not go with ZeRO-3"):
        planned("ppo", "policy.lora={rank: 8}", "critic.share_trunk=true", "engine.deepspeed=zero3")
    with pytest.raises(ConfigError, match=r"critic.share_trunk does not go with ZeRO-3"):
        own = "critic.deepspeed=zero2"
        planned("ppo", "policy.lora={rank: 8}", "critic.share_trunk=true", "engine.deepspeed=zero3", own)


def test_weights_with_adapters_merged_lie_beside_the_others_in_a_rollout_alone():
    def merged(*settings: str) -> dict[str, int]:
        plan = planned("ppo", "policy.lora={rank: 8}", "critic.share_trunk=false", *settings)
        return {phase.name: phase.device.get("rollout: weights with adapters merged", 0) for phase in plan.phases}

    found = merged("engine.deepspeed=zero2", "reference.path=null")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert found.pop("rollout") == pytest.approx(2 * 32 * layer, rel=0.02) and not any(found.values())
    assert not any(merged("engine.deepspeed=zero3").values()), "the copy of the policy is merged itself"


@pytest.mark.parametrize(("stage", "role"), [("reward", "reward model"), ("ppo", "critic")])
def test_under_zero3_a_start_needs_the_share_and_one_tensor(stage, role):
    """Whole it would be 15 GB of bfloat16."""
    starts = {}
    for nodes in (1, 8):
        plan = planned(stage, "engine.deepspeed=zero3", cluster=h100(nodes))
        (phase,) = (each for each in plan.phases if each.name == f"{role}: start")
        found = next(each for each in plan.roles.all if each.name == role)
        assert phase.device[f"{role}: largest tensor"] == 2 * max(found.model.sizes)
        assert phase.host == {"libraries": 4 * 2**30}
        starts[nodes] = sum(size for name, size in phase.device.items() if name.startswith(role))
        kept = plan.states[role].device["kept whole"]
        share = (2 + 4 + 4) * found.model.total / plan.cluster.ranks
        assert starts[nodes] == pytest.approx(share + kept + 2 * max(found.model.sizes), rel=1e-3)
    assert starts[8] < starts[1] / 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [2 * 2**40, 2**37])
def test_publishing_what_is_shared_needs_no_whole_model_on_a_rank(precision, memory):
    """Compared in float32; opened by one process where a host has memory for that, else by all ranks."""
    settings = ("model.path=llama-3-70b", "model.lora={rank: 32}", "engine.deepspeed=zero3")
    plan = planned("sft", *settings, f"engine.precision={precision}", cluster=h100(8, host_memory=memory))
    phases = {phase.name: phase for phase in plan.phases if phase.name.startswith("publishing")}
    share = -(-plan.roles.main.model.total // 64)
    expected = {"publishing: comparing"} if precision == "bfloat16" else set()
    expected |= set() if memory > 2**40 else {"publishing: opening"}
    assert set(phases) == expected
    for phase in phases.values():
        assert (2 if precision == "bfloat16" else 4) * share in phase.device.values()
    whole = 4 * plan.roles.main.model.total
    assert (plan.publishing.host_bytes > whole) == (memory > 2**40)
    assert max(phase.device_bytes for phase in plan.phases) < plan.cluster.device_memory
    assert not any("publishing" in phase.name for phase in planned("sft", *settings, "train.publish=none").phases)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_after_a_shortage_a_plan_that_fits_has_advice_all_the_same(name):
    plan = planned("reward", f"engine.deepspeed={name}")
    assert plan.fits and next_knob(plan) is None
    line = advice(plan)
    assert f"{plan.largest_item[0]} {gib(plan.largest_item[1])}" in line
    assert line.endswith("; next knob: train.micro_batch_tokens=4096") and line.count(",") == 2


def test_a_70b_model_starts_on_one_node_where_no_device_could_hold_it_whole():
    plan = planned("preference", "model.path=llama-3-70b", "model.lora={rank: 32}", "engine.deepspeed=zero3")
    (start,) = (each for each in plan.phases if each.name == "policy: start")
    assert 2 * plan.roles.main.model.total > plan.cluster.device_memory > 3 * start.device_bytes
    whole = planned("preference", "model.path=llama-3-70b", "model.lora={rank: 32}", "engine.deepspeed=zero2")
    assert not whole.fits


def test_the_start_on_cpus_has_the_largest_tensor_once_and_a_trained_one_twice():
    """As docs/zero.md has it measured."""

    def largest(*settings: str) -> int:
        cluster = cluster_of(device="cpu", devices_per_node=2)
        plan = planned("preference", "model.path=llama-3-8b", "engine.deepspeed=zero3", *settings, cluster=cluster)
        start = next(each for each in plan.phases if each.name == "policy: start")
        return start.host["policy: largest tensor"]

    table = 4 * 128256 * 4096
    assert largest("model.lora=null") == 2 * table
    assert largest("model.lora={rank: 8}") == table


def test_more_rows_at_once_need_a_larger_cache():
    def cache(rows):
        plan = planned("ppo", f"rollout.batch_rows={rows}", "rollout.prompts=1024")
        return next(each for each in plan.phases if each.name == "rollout").device["rollout: KV cache"]

    assert cache(64) == 8 * cache(8)


def test_a_reward_model_that_is_not_there_is_taken_to_be_like_the_policy():
    plan = planned("ppo", "reward.path=runs/nothing/final")
    (scorer,) = (role.model for role in plan.roles.asked if role.name == "reward model")
    assert scorer.shape == plan.roles.main.model.shape
    assert any("runs/nothing/final is not there yet" in note for note in plan.roles.notes)


def test_the_advice_is_a_plan_that_fits():
    tight = planned("sft", "engine.deepspeed=zero0", cluster=h100())
    assert not tight.fits
    assert "nearer" in next_knob(tight) or "then it fits" in next_knob(tight)
    name = smallest_config(tight)
    assert planned("sft", f"engine.deepspeed={name}").fits
    order = ["zero0", "zero1", "zero2", "zero3_hpz", "zero3", "zero2_offload", "zero3_offload"]
    smaller = order[: order.index(name)]
    assert not any(planned("sft", f"engine.deepspeed={each}").fits for each in ("zero0", "zero1") if each in smaller)
    roomy = planned("sft", cluster=h100(device_memory=10**13))
    assert roomy.fits
    assert next_knob(roomy) is None
    assert smallest_config(roomy) == "zero0"


def test_twice_the_rate_is_half_the_time_and_checkpointing_costs_some():
    slow, fast = (planned("sft", cluster=h100(flops=rate)) for rate in (1e14, 2e14))
    assert run_seconds(slow) == pytest.approx(2 * run_seconds(fast))
    again = planned("sft", "model.gradient_checkpointing=true", cluster=h100(flops=1e14))
    ratio = sum(step_seconds(again).values()) / sum(step_seconds(slow).values())
    assert 1.2 < ratio < 4 / 3
    assert run_seconds(planned("sft", cluster=h100(flops=None))) is None


def test_six_flops_a_parameter_and_token():
    plan = planned("reward", cluster=h100(flops=1e15, utilization=1.0), mean_tokens=100.0)
    seconds = step_seconds(plan)["training"] * 8
    model = plan.roles.main.model
    rule = 6 * model.matrix_parameters * plan.batches.computed_per_step / 1e15
    assert seconds == pytest.approx(rule, rel=0.02)  # attention is small in short rows


def test_checkpoints_hold_what_is_trained():
    full = planned("sft", "engine.deepspeed=zero2")
    assert checkpoint_bytes(full) == 14 * full.roles.main.model.total
    adapters = planned("sft", "engine.deepspeed=zero2", "model.lora={rank: 4}")
    assert checkpoint_bytes(adapters) == 14 * adapters.roles.main.model.trainable


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_plans_without_weights(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage = next((name for name in training() if recipe.name.removeprefix("quickstart_").startswith(name)), None)
    if stage is None:
        pytest.skip("not the recipe of one stage")
    config = load_config(STAGES[stage].config_class(), [recipe], [], program="test")
    sources = Sources() if "llama" in recipe.name else Sources(fallback="smollm2-135m")
    request = Request(sources=sources, rows=500, mean_tokens=60.0)
    plan = plan_stage(stage, config, h100(nodes=2), request)
    assert plan.batches.total_steps
    assert all(value >= 0 for each in plan.phases for value in (*each.device.values(), *each.host.values()))
    if "llama" in recipe.name:
        assert plan.roles.main.model.total > 7e9


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("80g", 80 * 2**30), ("0.5 TB", 5 * 10**11)])
def test_sizes_are_read_with_their_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80 bananas", "-3GiB", "0"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="expected a size such as 80GiB"):
        parse_bytes(text)
