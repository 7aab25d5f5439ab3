"""What recipes say that their runs are made of."""

import dataclasses
import subprocess
import sys

import pytest

from launch.stages import training
from rlhf.config import load_config
from rlhf.models.roles import published_role, role_named

NEEDED = {
    "sft": ("model.path=m", "data.train=d"),
    "reward": ("model.path=m", "data.train=d"),
    "preference": ("model.path=m", "data.train=d"),
    "ppo": ("policy.path=m", "reward.path=r", "data.train=d"),
}
TWO_REWARDS = "reward.path=[r, s]"


def models(stage: str, *settings: str):
    given = ["output=o", *NEEDED[stage], *settings]
    return load_config(training()[stage].config_class(), [], given, program="test").models


def where(role) -> str:
    return role.inside or role.placement


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        ("sft", (), {"policy": "zero2"}),
        ("reward", ("engine.deepspeed=zero3",), {"reward model": "zero3"}),
        ("preference", (), {"policy": "zero2", "reference": "policy"}),
        ("preference", ("loss.kind=simpo",), {"policy": "zero2"}),
        ("preference", ("reference.path=x",), {"policy": "zero2", "reference": "replicated"}),
        ("preference", ("reference.kind=live",), {"policy": "zero2", "reference": "replicated"}),
        ("preference", ("reference.kind=live", "model.lora={rank: 4}"), {"policy": "zero2", "reference": "policy"}),
        (
            "ppo",
            (),
            {"reward model": "replicated", "policy": "zero2", "critic": "zero2", "reference": "replicated"},
        ),
        (
            "ppo",
            ("policy.lora={rank: 4}", "critic.share_trunk=true", "reward.placement=zero3"),
            {"reward model": "zero3", "policy": "zero2", "critic": "policy", "reference": "policy"},
        ),
        (
            "ppo",
            (TWO_REWARDS, "watch.second.path=t", "advantage.estimator=reinforce_pp", "reference.placement=zero3"),
            {
                "reward model 1": "replicated",
                "reward model 2": "replicated",
                "second scorer": "replicated",
                "policy": "zero2",
                "reference": "zero3",
            },
        ),
    ],
)
def test_a_recipe_lists_its_models_in_the_order_of_loading(stage, settings, expected):
    assert {role.name: where(role) for role in models(stage, *settings)} == expected
    assert [role.name for role in models(stage, *settings)] == [*expected]


def test_a_reference_that_fills_a_cache_does_not_stay():
    for settings in ((), ("reference.path=x",)):
        assert not role_named(models("preference", *settings), "reference").stays
    assert role_named(models("preference", "reference.kind=live"), "reference").stays
    assert role_named(models("ppo"), "reference").stays


@pytest.mark.parametrize(
    ("settings", "setting", "path"),
    [
        ((), "reward.path", "r"),
        ((TWO_REWARDS,), "reward.path", "r"),
        (("critic.path=c",), "critic.path", "c"),
        (("reward.retokenize=true",), "policy.path", "m"),
        (("policy.lora={rank: 4}", "critic.share_trunk=true"), "critic.share_trunk", "m"),
    ],
)
def test_the_critic_says_which_setting_it_starts_from(settings, setting, path):
    critic = role_named(models("ppo", *settings), "critic")
    assert (critic.setting, critic.backbone.path) == (setting, path)


@pytest.mark.parametrize("stage", NEEDED)
def test_each_run_publishes_one_trained_model_and_names_settings_that_there_are(stage):
    optional = ("watch.second.path=t",) if stage == "ppo" else ()
    config = load_config(
        training()[stage].config_class(), [], ["output=o", *NEEDED[stage], *optional], program="test"
    )
    assert sum(role.published for role in config.models) == 1
    main = published_role(config.models)
    assert main.trained and main.backbone is config.model and main.optimizer is config.optim
    for role in config.models:
        for key in (role.setting, role.placed_by, role.section):
            node = config
            for name in key.split(".") if key else ():
                assert name in {field.name for field in dataclasses.fields(node)}, key
                node = getattr(node, name)


@pytest.mark.parametrize("stage", NEEDED)
def test_what_a_run_is_made_of_is_known_without_torch(stage):
    code = (
        "import sys\nfrom launch.stages import training\nfrom rlhf.config import load_config\n"
        f"config = load_config(training()[{stage!r}].config_class(), [], {['output=o', *NEEDED[stage]]}, program='t')\n"
        "assert config.models and config.workload\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
