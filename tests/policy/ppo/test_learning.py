"""The stage learns: a random model, a rule as reward, seconds on one thread; and that KL holds it back."""

import json
from dataclasses import replace

import pytest

from policy.ppo.config import AdvantageConfig, KlConfig, RolloutConfig, SurrogateConfig
from policy.ppo.estimators import ESTIMATORS
from policy.ppo.stage import run
from rlhf.engine.options import OptimizerConfig

STEPS = 18


@pytest.fixture
def learn(tiny_config, alone):
    """``learn(steps, **sections)``: rows of metrics.jsonl of a run whose reward is the share of the letters a, b, c."""

    def start(steps: int = STEPS, **sections) -> list[dict]:
        optimizer = OptimizerConfig(learning_rate=2e-2, schedule="constant", warmup_share=0.0)
        base = replace(
            tiny_config,
            policy=replace(tiny_config.policy, layers=2),
            data=replace(tiny_config.data, eval_share=0.0),
            rollout=RolloutConfig(prompts=16, samples=4, max_new_tokens=6),
            kl=KlConfig(coefficient=0.0),
            loss=SurrogateConfig(epochs=2),
            critic=replace(tiny_config.critic, optim=replace(optimizer, learning_rate=1e-2)),
            optim=optimizer,
            train=replace(
                tiny_config.train, global_batch_size=64, micro_batch_tokens=8192, length_buckets=1, epochs=100,
                max_steps=steps,
            ),
        )  # fmt: skip
        config = replace(base, **sections)
        run(config, alone)
        return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]

    return start


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_raises_the_reward_from_below_a_tenth_to_above_eight(learn, estimator):
    rewards = [row["reward"] for row in learn(advantage=AdvantageConfig(estimator=estimator))]
    assert len(rewards) == STEPS
    assert rewards[0] < 0.1
    assert sum(rewards[-3:]) / 3 > 0.8, rewards


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_a_larger_coefficient_keeps_the_policy_nearer_to_the_reference(learn, tmp_path, place):
    rows = {
        coefficient: learn(
            12,
            output=tmp_path / str(coefficient),
            kl=KlConfig(coefficient=coefficient, place=place),
            advantage=AdvantageConfig(estimator="grpo_unscaled"),
            optim=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0),
        )[-1]
        for coefficient in (0.0, 0.03, 1.0)
    }
    kls = [row["kl_k3"] for row in rows.values()]
    assert kls[0] > 2 * kls[1] and kls[1] > 1.5 * kls[2], kls
    rewards = [row["reward"] for row in rows.values()]
    assert rewards[0] > rewards[1] > rewards[2], "what is not moved is not rewarded either"


def test_the_adaptive_controller_brings_the_kl_to_its_target(learn, tmp_path):
    kl = KlConfig(coefficient=0.01, target=2.0, horizon=40)
    estimator = AdvantageConfig(estimator="grpo_unscaled")
    fixed = learn(10, output=tmp_path / "fixed", kl=kl, advantage=estimator)
    adaptive = learn(20, output=tmp_path / "adaptive", kl=replace(kl, controller="adaptive"), advantage=estimator)
    assert fixed[-1]["kl"] > 3 * kl.target
    assert kl.target / 2 < adaptive[-1]["kl"] < 2 * kl.target, [row["kl"] for row in adaptive]
    coefficients = [row["kl_coefficient"] for row in adaptive]
    assert min(coefficients) < 0.01 < coefficients[-1], "down while the KL is below its target, then up"
