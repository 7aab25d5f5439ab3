"""A recipe that was written before a key was renamed is told the new name."""

import re

import pytest

from policy.ppo.config import PpoConfig
from policy.preference.config import PreferenceConfig
from policy.sft.config import SftConfig
from reward.config import RewardConfig
from rlhf.config import load_config
from rlhf.core.errors import ConfigError


@pytest.mark.parametrize("config", [RewardConfig, PreferenceConfig, SftConfig, PpoConfig])
@pytest.mark.parametrize("value", [4, "many"])
def test_row_groups_are_length_buckets(config, value):
    assert_named(config, f"train.row_groups={value}", "train.length_buckets")


@pytest.mark.parametrize(
    ("config", "setting", "now"),
    [
        (RewardConfig, "margin.max_sweeps=9", "margin.parameters.max_iterations"),
        (PreferenceConfig, "margin.max_sweeps=many", "margin.parameters.max_iterations"),
        (RewardConfig, "margin.centre_rewards=false", "margin.parameters.center_rewards"),
        (PreferenceConfig, "margin.centre_rewards=false", "margin.parameters.center_rewards"),
        (RewardConfig, "margin.epsilon=0.2", "margin.parameters.epsilon"),
        (RewardConfig, "margin.queue_pairs=64", "margin.parameters.queue_pairs"),
        (PreferenceConfig, "margin.reading=max", "margin.parameters.reading"),
        (PpoConfig, "reward.standardise=false", "reward.standardize"),
        (PpoConfig, "watch.second.standardise=true", "watch.second.standardize"),
        (PpoConfig, "loss.normalise=sequence", "loss.normalize"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(config, setting, now):
    assert_named(config, setting, now)


def assert_named(config, setting, now):
    with pytest.raises(ConfigError, match=rf"{re.escape(setting.split('=')[0])} = .*did you mean {re.escape(now)}\?"):
        load_config(config, [], [setting], program="test")
