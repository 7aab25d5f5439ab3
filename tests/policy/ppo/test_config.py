"""Settings that cannot work are refused with the reason, before anything is loaded."""

import pytest

from policy.ppo.config import PpoConfig
from policy.ppo.estimators import ESTIMATORS
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
        (["reward.function=m:f"], r"give either path .* or function"),
        (["reward.combine=min"], r"combine = min needs an ensemble"),
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
        (["watch.second.retokenize=true"], r"give either path"),
        (["reward.truncated=penalty"], r"minus missing_end_penalty: set that above 0"),
        (["reward.truncated=mask", "reward.missing_end_penalty=1"], r"penalty = 1\.0 would count for nothing"),
        (["loss.clip_low=0"], r"greater than 0"),
        (["loss.dual_clip=1"], r"greater than 1"),
        (["advantage.gamma=1.1"], r"less than or equal to 1"),
        (["rollout.temperature=0"], r"greater than 0"),
        (["ema=1.5"], r"less than or equal to 1"),
        (["rollout.sampels=2"], r"did you mean rollout\.samples"),
        (["model.path=p"], r"unknown key"),
    ],
)
def test_refused(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(*overrides)


def test_a_reward_must_be_named():
    with pytest.raises(ConfigError, match=r"give either path .* or function"):
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
