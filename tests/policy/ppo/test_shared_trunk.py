"""A critic on the policy's own base: it learns its part, and the policy never notices."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from policy.building import build_policy
from policy.ppo.config import CriticConfig
from policy.ppo.shared_trunk import SharedTrunkCritic
from policy.ppo.stage import run
from rlhf.data.batching import Row, length_bucket
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.models.options import LoraOptions

RULES = {"schedule": "constant", "warmup_share": 0.0}


@pytest.fixture
def shared(tiny_config, tiny_tokenizer, alone):
    """Engines of a policy with adapters and of the critic on its base."""
    config = replace(tiny_config.policy, lora=LoraOptions(rank=4, alpha=8), freeze_layers=1)
    model = build_policy(config, dtype=torch.float32, vocabulary=len(tiny_tokenizer), seed=0)
    optimizer = OptimizerConfig(learning_rate=1e-2, **RULES)
    policy = LocalEngine(model, ranks=alone, optimizer=optimizer, total_steps=100)
    critic = SharedTrunkCritic(model, freeze_layers=1, seed=0)
    return policy, LocalEngine(critic, ranks=alone, optimizer=optimizer, total_steps=100)


@pytest.fixture
def bucket():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 14, 6):
        tokens = torch.randint(3, 300, (length,), generator=generator).numpy()
        rows.append(Row(tokens, torch.arange(length).numpy() >= 4))
    return length_bucket(rows)


def logprobs(policy, bucket):
    with torch.no_grad():
        return policy.forward((bucket,)).logprobs[0]


def test_the_critic_learns_and_the_policy_stays_what_it_was(shared, bucket):
    policy, critic = shared
    before, losses = logprobs(policy, bucket), []
    start = {name: value.detach().clone() for name, value in critic.module.named_parameters()}
    mask = bucket.response_mask[:, 1:]
    for _ in range(30):
        with torch.no_grad(), policy.module.without_adapters():
            policy.forward((bucket,))  # the reference of a step switches adapters off and on
        (values,) = critic.forward((bucket,))
        loss = (values - 1.5)[mask].square().mean()
        critic.backward(loss, last=True)
        assert critic.step().applied
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    torch.testing.assert_close(logprobs(policy, bucket), before, rtol=0, atol=0)
    moved = {name for name, value in critic.module.named_parameters() if not torch.equal(value, start[name])}
    assert "score.weight" in moved
    assert sum(name.startswith("adapters") for name in moved) > 10


def test_the_policy_learns_and_the_values_stay_what_they_were(shared, bucket):
    policy, critic = shared
    with torch.no_grad():
        (before,) = critic.forward((bucket,))
    start = logprobs(policy, bucket)
    for _ in range(5):
        policy.backward(-policy.forward((bucket,)).logprobs[0].sum(), last=True)
        policy.step()
    assert float((logprobs(policy, bucket) - start).sum()) > 1
    with torch.no_grad():
        torch.testing.assert_close(critic.forward((bucket,))[0], before, rtol=0, atol=0)


def test_values_are_those_of_a_classifier_on_the_base_as_long_as_the_adapter_is_new(shared, bucket, tiny_model):
    _, critic = shared
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).base_model
    states = plain(input_ids=bucket.tokens, attention_mask=bucket.token_mask.long()).last_hidden_state
    expected = (states @ critic.module.score.weight.T).squeeze(-1)[:, :-1] * bucket.response_mask[:, 1:]
    with torch.no_grad():
        torch.testing.assert_close(critic.forward((bucket,))[0], expected, rtol=1e-4, atol=1e-6)


def test_a_run_publishes_a_policy_without_the_second_adapter(tiny_config, alone):
    config = replace(
        tiny_config,
        policy=replace(tiny_config.policy, lora=LoraOptions(rank=4, alpha=8)),
        critic=CriticConfig(share_trunk=True, optim=OptimizerConfig(learning_rate=1e-2, **RULES)),
        train=replace(tiny_config.train, max_steps=2, checkpoint_every=1, publish="last"),
    )
    run(config, alone)
    final = AutoModelForCausalLM.from_pretrained(config.output / "final")
    assert not [name for name in final.state_dict() if "lora" in name or "critic" in name]


def test_two_ranks_give_the_curve_of_one_and_zero_3_is_refused(run_ranks, runs, tiny_config, prompts_file, tmp_path):
    def command(folder, *overrides):
        return [
            "-m", "policy.ppo", f"output={folder}", f"policy.path={tiny_config.policy.path}", "policy.lora={rank: 4}",
            "critic.share_trunk=true", "reward.function=rules:share_of_abc", f"data.train={prompts_file}",
            f"data.cache_dir={tmp_path}/cache", "data.eval_share=0", "rollout={prompts: 6, max_new_tokens: 6}",
            "train={global_batch_size: 4, max_steps: 2, publish: none, tensorboard: false}", *overrides,
        ]  # fmt: skip

    here = Path(__file__).resolve().parent
    path = {"PYTHONPATH": f"{here.parents[2]}:{here}"}
    run_ranks(command(tmp_path / "one", "engine.deepspeed=zero0"), ranks=1, **path)
    run_ranks(command(tmp_path / "two", "engine.deepspeed=zero2"), ranks=2, **path)
    runs.assert_close(runs.rows(tmp_path / "two"), runs.rows(tmp_path / "one"), 3e-4)
    outputs = run_ranks(command(tmp_path / "three", "engine.deepspeed=zero3"), ranks=2, expect=2, **path)
    assert "critic.share_trunk does not go with ZeRO-3" in outputs[0]
