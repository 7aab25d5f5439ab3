"""Settings that cannot work are refused with the reason, before anything is loaded."""

import typing

import pytest

from policy.ppo.config import PpoConfig
from policy.ppo.estimators import ESTIMATORS
from policy.ppo.presets import PRESETS
from policy.ppo.stage import preset_lines
from rlhf.config import load_config, parse_command_line, to_yaml
from rlhf.core.errors import ConfigError

BASE = ["output=runs/x", "policy.path=p", "data.train=prompts.jsonl"]
REWARD = "reward.path=runs/reward/final"


def parse(*overrides, reward=REWARD):
    given = [*BASE, *([reward] if reward else []), *overrides]
    return parse_command_line(PpoConfig, given, program="policy.ppo", description="").config


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["reward.function=m:f"], r"give one of path .* function, url and terms"),
        (["advantage.estimator=ppo"], r"estimator = ppo: there are gae, rloo"),
        (["kl.place=loss", "kl.estimator=k1"], r"expected gradient of zero; take k2 or k3"),
        (["kl.controller=adaptive", "kl.coefficient=0"], r"from 0 it can never rise"),
        (["kl.controller=adaptive", "kl.horizon=10"], r"kl\.horizon = 10\.0 must be above a fifth of 64 rollouts"),
        (["train.global_batch_size=65"], r"global_batch_size = 65 .* only rollout\.prompts x rollout\.samples = 64"),
        (["critic.share_trunk=true"], r"critic\.share_trunk needs policy\.lora"),
        (
            ["critic.share_trunk=true", "policy.lora={rank: 4}", "critic.path=c"],
            r"critic\.share_trunk .* neither critic\.lora nor critic\.path",
        ),
        (
            ["policy.lora={rank: 4, dropout: 0.1}"],
            r"policy.lora.dropout and critic.lora.dropout must be off",
        ),
        (
            ["critic.share_trunk=true", "policy.lora={rank: 4}", "policy.gradient_checkpointing=true"],
            r"share_trunk does not go with gradient_checkpointing",
        ),
        (
            ["reward.length_penalty=1", "reward.length_free_tokens=128"],
            r"length_free_tokens = 128 must be below rollout\.max_new_tokens = 128",
        ),
        (["watch.second.combine=min", "watch.second.function=m:f"], r"combine = min needs an ensemble"),
        (["watch.second.retokenize=true"], r"give one of path"),
        (["reward.truncated=penalty"], r"minus missing_end_penalty: set that above 0"),
        (["reward.truncated=mask", "reward.missing_end_penalty=1"], r"penalty = 1\.0 would count for nothing"),
        (["reward.path=[]", "reward.url=host:8000"], r"url = host:8000: expected the address of a server"),
        (["reward.path=[]", "reward.terms=[{url: ''}]"], r"give one of path .* function .* and url"),
        (["reward.path=[]", "reward.terms=[{url: 'http://h', failures: 0.1}]"], r"url = http://h: options, col"),
        (
            ["reward.path=[]", "reward.url=http://h", "reward.retokenize=true", "reward.truncated=score"],
            r"truncated = score shows a response cut off",
        ),
        (["loss.clip_low=0"], r"greater than 0"),
        (["loss.dual_clip=1"], r"greater than 1"),
        (["advantage.gamma=1.1"], r"less than or equal to 1"),
        (["rollout.temperature=0"], r"greater than 0"),
        (["watch.action=best", "train.publish=last"], r"it needs train\.publish=best and train\.evaluate_first=true"),
        (["watch.action=best", "train.evaluate_first=false"], r"the start included"),
        (["ema=1.5"], r"less than or equal to 1"),
        (["rollout.backend=vllm", "rollout.logprobs=sampler"], r"needs entropies, which backend = vllm does not tell"),
        (["rollout.backend=vllm", "rollout.temperature=0.7", "rollout.top_p=0.9"], r"at temperature 1 only"),
        (["rollout.backend=vllm", "rollout.vllm.urls=[http://a]", "rollout.vllm.engines=2"], r"leave engines out"),
        (["rollout.backend=vllm", "rollout.vllm.urls=[a:8000]"], r"urls = a:8000: expected the address of a server"),
        (["rollout.backend=vllm", "rollout.vllm.transport=nccl"], r"without devices the engines share those of the"),
        (["rollout.backend=vllm", "rollout.vllm.transport=gloo", "rollout.vllm.folder=x"], r"without one: leave it"),
        (
            ["rollout.backend=vllm", "rollout.vllm.transport=gloo", "rollout.ahead=1", "loss.importance=token"],
            r"weights which training has left behind by then; take vllm\.transport = folder",
        ),
        (["rollout.ahead=1"], r"writes no responses while it learns; take backend = vllm"),
        (["loss.importance=token", "rollout.logprobs=sampler"], r"taken for the same: every weight would be 1"),
        (["rollout.backend=vllm", "rollout.ahead=1"], r"set loss\.importance to token or sequence"),
        (["rollout.sampels=2"], r"did you mean rollout\.samples"),
        (["model.path=p"], r"unknown key"),
    ],
)
def test_refused(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(*overrides)


def test_a_reward_must_be_named():
    with pytest.raises(ConfigError, match=r"give one of path .* function, url and terms"):
        parse(reward=None)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_that_compare_responses_need_two_of_them(estimator):
    if not ESTIMATORS[estimator].needs_groups:
        assert parse(f"advantage.estimator={estimator}").rollout.samples == 1
        return
    with pytest.raises(ConfigError, match=r"rollout\.samples must be 2 or more"):
        parse(f"advantage.estimator={estimator}")
    assert parse(f"advantage.estimator={estimator}", "rollout.samples=2").rollouts == 128


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ([], "k1"),
        (["kl.place=loss"], "k3"),
        (["kl.place=loss", "kl.estimator=k2"], "k2"),
        (["kl.estimator=k3"], "k3"),
    ],
    ids=str,
)
def test_the_usual_estimator_of_the_kl_depends_on_its_place(overrides, kind):
    assert parse(*overrides).kl.kind == kind


def test_a_recipe_survives_writing_and_reading(tmp_path):
    config = parse(
        "reward.path=[a, b]",
        "reward.combine=min",
        "reward.clip=null",
        "watch.second={function: m:f}",
        "pretraining={data: {train: chats.jsonl}}",
        "critic.lora={rank: 4}",
        "rollout.stop=[END]",
        reward=None,
    )
    assert config.reward.paths == ("a", "b") and config.watch.second.function == "m:f"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(PpoConfig, [tmp_path / "config.yaml"], [], program="policy.ppo") == config


FOR_GRPO = {"kl.coefficient": 0.04, "kl.place": "loss", "kl.kind": "k3", "loss.normalize": "sequence"}
METHODS = {
    "grpo": FOR_GRPO | {"advantage.estimator": "grpo", "rollout.samples": 64, "updates": 1, "minibatch": 64 * 64},
    "dr_grpo": {
        "advantage.estimator": "grpo_unscaled", "kl.coefficient": 0, "loss.normalize": "constant",
        "rollout.samples": 8, "updates": 8, "minibatch": 64,
    },
    "gspo": {
        "advantage.estimator": "grpo", "kl.coefficient": 0, "loss.normalize": "sequence", "loss.ratio": "sequence",
        "loss.clip_low": 0.0003, "loss.upper": 0.0004, "rollout.samples": 8, "updates": 4, "minibatch": 128,
    },
    "dapo": {
        "advantage.estimator": "grpo", "kl.coefficient": 0, "loss.normalize": "token", "loss.clip_low": 0.2,
        "loss.upper": 0.28, "rollout.samples": 16, "rollout.extra_rounds": 3, "updates": 16, "minibatch": 64,
    },
    "cispo": {
        "advantage.estimator": "grpo", "kl.coefficient": 0, "loss.objective": "cispo", "loss.clip_low": 1.0,
        "loss.upper": 4.0, "loss.normalize": "token", "rollout.samples": 16, "updates": 16, "minibatch": 64,
    },
    "rloo": {
        "advantage.estimator": "rloo", "kl.coefficient": 0.03, "kl.place": "reward", "kl.kind": "k1",
        "rollout.samples": 4, "updates": 2, "minibatch": 128,
    },
    "reinforce_pp": {
        "advantage.estimator": "reinforce_pp", "advantage.whitened": True, "kl.coefficient": 0.01, "kl.kind": "k1",
        "kl.place": "reward", "loss.normalize": "token", "rollout.samples": 1, "updates": 8, "minibatch": 8,
    },
}  # fmt: skip


def looked_up(config, key):
    for part in {"minibatch": "train.global_batch_size"}.get(key, key).split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_the_method_of_its_paper(name, tmp_path):
    config = parse(f"preset={name}")
    assert {key: looked_up(config, key) for key in METHODS[name]} == METHODS[name]
    assert config.loss.epochs == 1 and config.advantage.whitened == (name == "reinforce_pp")
    (line,) = preset_lines(config)
    assert line.endswith("the paper's settings in all that makes the method") and PRESETS[name].source in line
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(PpoConfig, [tmp_path / "config.yaml"], [], program="policy.ppo") == config


def test_every_preset_is_tried():
    assert METHODS.keys() == PRESETS.keys()
    kinds = typing.get_args(typing.get_args(PpoConfig.__annotations__["preset"])[0])
    assert set(kinds) == set(PRESETS)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_recipe_sets_wins_and_the_log_says_where_that_is_another_method(name, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"preset: {name}\nkl: {{coefficient: 0.3}}\nrollout: {{prompts: 16}}\n")
    given = [*BASE, REWARD, "loss.epochs=3", "rollout.samples=2"]
    config = load_config(PpoConfig, [tmp_path / "recipe.yaml"], given, program="policy.ppo")
    assert (config.kl.coefficient, config.loss.epochs, config.rollouts) == (0.3, 3, 32)
    assert config.train.global_batch_size == 32 // PRESETS[name].updates, "the minibatch follows the rollouts"
    assert config.advantage.estimator == METHODS[name]["advantage.estimator"]
    head, *lines = preset_lines(config)
    assert name in head and head.endswith("this run differs from it in")
    assert f"  kl.coefficient = 0.3 ({name}: {float(METHODS[name]['kl.coefficient'])})" in lines
    assert f"  loss.epochs = 3 ({name}: 1)" in lines
    assert f"  rollout.samples = 2 ({name}: {METHODS[name]['rollout.samples']})" in lines
    assert len(lines) == 3


@pytest.mark.parametrize("change", ["loss.clip_high=0.28", "loss.entropy=0.01", "reward.length_penalty=1"])
def test_any_setting_of_the_method_that_differs_is_told(change):
    _, line = preset_lines(parse("preset=grpo", change))
    assert line.strip().startswith(change.replace("=", " = "))


def test_without_a_preset_nothing_is_said_and_an_unknown_one_is_refused():
    assert preset_lines(parse()) == []
    with pytest.raises(ConfigError, match='preset = "gprpo"'):
        parse("preset=gprpo")


def test_one_folder_is_an_ensemble_of_one():
    assert parse().reward.paths == ("runs/reward/final",)


@pytest.mark.parametrize(("size", "minibatches"), [(64, 1), (32, 2), (25, 3), (63, 1), (1, 64)])
def test_minibatches_cover_the_rollouts(size, minibatches):
    assert parse(f"train.global_batch_size={size}").updates == 2 * minibatches


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (["reward.path=r"], 10.0),
        (["reward.path=[r, s]"], 10.0),
        (["reward.path=r", "reward.standardize=false"], None),
        (["reward.function=m:f"], None),
        (["reward.function=m:f", "reward.clip=3"], 3.0),
        (["reward.path=r", "reward.clip=null"], None),
    ],
    ids=str,
)
def test_only_standardized_scores_are_clipped_unless_asked_for(given, limit):
    assert parse(*given, reward=None).reward.score_limit == limit
