"""What a step of the stage updates, and by which gradient; the pull towards the reference."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from policy.ppo.config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PretrainingConfig,
    SurrogateConfig,
)
from policy.ppo.losses import truncated_importance
from policy.ppo.reward_options import RewardSourceConfig
from policy.ppo.rollouts import ask, by_response
from policy.ppo.stage import _Builder
from policy.ppo.update import Updater
from rlhf.data.examples import load_examples
from rlhf.data.options import ExampleDataConfig
from rlhf.data.prompts import PromptData
from rlhf.engine.options import OptimizerConfig
from rlhf.models.options import LoraOptions
from rlhf.train.chat import load_chat
from tests.policy.ppo.by_hand import (
    ALMOST_SGD,
    ONE_MINIBATCH,
    assert_moved_by,
    chosen_by_hand,
    experience_of,
    logits_by_hand,
    plain_copy,
    train_of,
    untimed,
)

# What is updated.

LOSSES = {
    "mean over tokens": {},
    "mean over responses": {"normalize": "sequence"},
    "constant": {"normalize": "constant"},
    "GSPO": {"ratio": "sequence", "normalize": "sequence", "clip_low": 0.02, "clip_high": 0.03},
    "clip-higher": {"clip_high": 0.4},
    "CISPO": {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    "dual clip": {"dual_clip": 1.2},
    "entropy bonus": {"entropy": 0.3},
    "importance of tokens": {"importance": "token", "importance_cap": 1.2},
    "importance of responses": {"importance": "sequence", "importance_cap": 2.5},
    "KL in the loss, k3": {"kl": KlConfig(place="loss", coefficient=0.5)},
    "KL in the loss, k2": {"kl": KlConfig(place="loss", coefficient=0.5, estimator="k2")},
}


def surrogate_by_hand(config, hf, experience, rows):
    """The loss of a minibatch, response by response and token by token."""
    rollouts, total, tokens = experience.rollouts, 0.0, 0
    for row in rows:
        distribution = logits_by_hand(hf, rollouts, row, config.rollout.temperature)
        now = chosen_by_hand(hf, rollouts, row, config.rollout.temperature)
        count = len(now)
        ratios = (now - experience.measured.logprobs[row, :count]).exp()
        if config.loss.ratio == "sequence":
            ratios = ratios.log().mean().exp().expand(count)
        losses = []
        for place in range(count):
            advantage, ratio = float(experience.advantages[row, place]), ratios[place]
            beyond = 1 + config.loss.upper if advantage > 0 else 1 - config.loss.clip_low
            is_clipped = ratio.item() > beyond if advantage > 0 else ratio.item() < beyond
            loss = -(beyond if is_clipped else ratio) * torch.tensor(advantage)
            if config.loss.objective == "cispo":
                loss = -min(ratio.item(), 1 + config.loss.upper) * advantage * now[place]
            if advantage < 0 and config.loss.dual_clip is not None:
                loss = loss.clamp_max(config.loss.dual_clip * -advantage)
            if config.loss.importance != "none":
                behind = (experience.measured.logprobs - rollouts.sampler_logprobs)[row, :count]
                behind = behind[place] if config.loss.importance == "token" else behind.sum()
                loss = loss * behind.exp().clamp_max(config.loss.importance_cap)
            if config.kl.place == "loss":
                gap = now[place] - experience.measured.reference[row, place]
                kl = gap**2 / 2 if config.kl.estimator == "k2" else torch.exp(-gap) - 1 + gap
                loss = loss + config.kl.coefficient * kl
            entropy = -(distribution[place].exp() * distribution[place]).sum()
            losses.append(loss - config.loss.entropy * entropy)
        part = torch.stack(losses).sum()
        if config.loss.normalize == "sequence":
            part = part / count / len(rows)
        if config.loss.normalize == "constant":
            part = part / config.rollout.max_new_tokens / len(rows)
        total, tokens = total + part, tokens + count
    return total / tokens if config.loss.normalize == "token" else total


def with_other_old_logprobs(experience):
    """The experience as if the policy had moved since the rollout: ratios on both sides of the bounds."""
    noise = 0.4 * torch.randn(experience.measured.logprobs.shape, generator=torch.Generator().manual_seed(3))
    logprobs = (experience.measured.logprobs + noise) * experience.rollouts.mask
    moved = replace(experience, measured=replace(experience.measured, logprobs=logprobs))
    if experience.importance is None:
        return moved
    rollouts, level = experience.rollouts, "token" if experience.importance_cap == 1.2 else "sequence"
    weights = truncated_importance(
        logprobs, rollouts.sampler_logprobs, rollouts.mask, level=level, cap=experience.importance_cap
    )
    return replace(moved, importance=weights)


@pytest.mark.parametrize("name", LOSSES)
def test_the_update_follows_the_gradient_of_the_loss_by_hand(make_task, tiny_config, name):
    changes = dict(LOSSES[name])
    kl = changes.pop("kl", KlConfig(coefficient=0.1))
    train = train_of(tiny_config, micro_batch_tokens=60, **ONE_MINIBATCH)
    shop = make_task(noise=0.02, kl=kl, loss=SurrogateConfig(epochs=1, **changes), train=train, optim=ALMOST_SGD)
    experience = with_other_old_logprobs(experience_of(shop))
    hf, before = plain_copy(shop.policy), shop.weights()
    report = Updater(shop.policy, shop.critic, shop.config).run(0, experience, kl.coefficient)
    expected = surrogate_by_hand(shop.config, hf, experience, range(16))
    expected.backward()
    gradients = {f"hf.{name}": p.grad for name, p in hf.named_parameters()}
    assert report.metrics()["policy/loss"] == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    assert_moved_by(shop.weights(), before, gradients)


def test_cispo_logs_the_share_of_tokens_whose_weight_is_bounded(make_task, tiny_config):
    train = train_of(tiny_config, **ONE_MINIBATCH)
    shop = make_task(loss=SurrogateConfig(epochs=1, **LOSSES["CISPO"]), train=train)
    before = experience_of(shop)
    moved = with_other_old_logprobs(before)
    report = Updater(shop.policy, shop.critic, shop.config).run(0, moved, 0.1)
    ratios = (before.measured.logprobs - moved.measured.logprobs).exp()[before.mask]
    bounded, good = ratios > 1.3, before.advantages[before.mask] > 0
    assert 0 < int((bounded & good).sum()) < int(bounded.sum())
    assert report.metrics()["policy/clip_share"] == pytest.approx(float(bounded.float().mean()), rel=1e-6)


def test_every_variant_of_the_loss_is_another_gradient(make_task, tiny_config):
    """Else the test above would not tell one from the other."""
    shop, found = make_task(noise=0.02), {}
    experience, hf = with_other_old_logprobs(experience_of(shop)), plain_copy(shop.policy)
    for name, changes in LOSSES.items():
        changes = dict(changes)
        kl = changes.pop("kl", KlConfig(coefficient=0.1))
        config = replace(shop.config, kl=kl, loss=SurrogateConfig(epochs=1, **changes))
        hf.zero_grad()
        surrogate_by_hand(config, hf, experience, range(16)).backward()
        found[name] = torch.cat([p.grad.flatten() for p in hf.parameters()])
    names = list(found)
    for place, left in enumerate(names):
        for right in names[:place]:
            far = float((found[left] - found[right]).norm() / found[right].norm())
            assert far > 1e-2, (left, right)


def test_the_critic_follows_the_gradient_of_its_loss_by_hand(make_task, tiny_config):
    critic = CriticConfig(optim=ALMOST_SGD, value_clip=0.05)
    shop = make_task(noise=0.02, critic=critic, train=train_of(tiny_config, micro_batch_tokens=60, **ONE_MINIBATCH))
    experience = experience_of(shop)
    noise = 0.1 * torch.randn(experience.returns.shape, generator=torch.Generator().manual_seed(4))
    experience = replace(
        experience,
        measured=replace(experience.measured, values=experience.measured.values + noise),
        returns=experience.returns + 5 * noise,
    )
    model, before = copy.deepcopy(shop.critic.module), shop.critic_weights()
    total, tokens = 0.0, 0
    for row in range(16):
        prompt, response = experience.rollouts.prompts[row].tokens, experience.rollouts.responses[row].tokens
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        states = model.scorer.hf.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        values = model.scorer.hf.score(states).squeeze(-1)
        for place, value in enumerate(values):
            old, target = experience.measured.values[row, place], experience.returns[row, place]
            near = torch.clamp(value, old - 0.05, old + 0.05)
            total = total + torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
        tokens += len(values)
    loss = total / tokens
    loss.backward()
    report = Updater(shop.policy, shop.critic, shop.config).run(0, experience, 0.0)
    assert report.metrics()["critic/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_moved_by(shop.critic_weights(), before, gradients)


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_micro_batches_change_neither_metrics_nor_weights(make_task, tiny_config, estimator):
    found = []
    for budget in (40, 5000):
        shop = make_task(
            noise=0.02,
            advantage=AdvantageConfig(estimator=estimator),
            loss=SurrogateConfig(epochs=2),
            optim=replace(ALMOST_SGD, learning_rate=0.3),
            critic=CriticConfig(optim=replace(ALMOST_SGD, learning_rate=0.3)),
            train=train_of(tiny_config, micro_batch_tokens=budget),
        )
        metrics = [untimed(shop.step(number).metrics) for number in range(2)]
        found.append((metrics, shop.weights(), shop.weights() if shop.critic is None else shop.critic_weights()))
    (small, *small_weights), (large, *large_weights) = found
    for left, right in zip(small, large, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert math.isclose(left[name], value, rel_tol=1e-3, abs_tol=2e-5), name
    for left, right in zip(small_weights, large_weights, strict=True):
        for name, value in right.items():
            torch.testing.assert_close(left[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_while_the_critic_warms_up_the_policy_rests(make_task, tiny_config):
    shop = make_task(critic=replace(tiny_config.critic, warmup_steps=2))
    policy, critic = shop.weights(), shop.critic_weights()
    for number in range(2):
        metrics = shop.step(number).metrics
        assert not any(name.startswith("policy/") for name in metrics)
        assert all(torch.equal(value, policy[name]) for name, value in shop.weights().items())
        assert any(not torch.equal(value, critic[name]) for name, value in shop.critic_weights().items())
        critic = shop.critic_weights()
    metrics = shop.step(2).metrics
    assert metrics["policy/grad_norm"] > 0
    assert any(not torch.equal(value, policy[name]) for name, value in shop.weights().items())


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_schedules_end_with_the_run_whatever_was_skipped(make_task, tiny_config, text_scorer, warmup_steps):
    """Four steps of two epochs of two minibatches: policy updates skipped at first, all of one step in the end."""
    falling = OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_share=0.0)
    last = math.inf

    def judge(text):
        return len(text) if math.isinf(last) else last

    shop = make_task(
        scorer=text_scorer(judge),
        optim=falling,
        critic=replace(tiny_config.critic, optim=falling, warmup_steps=warmup_steps),
        loss=SurrogateConfig(epochs=2, stop_epoch_kl=1e-9),
        total_steps=4 * 4,
    )
    rates = {"policy": [], "critic": []}
    for number in range(3):
        metrics = shop.step(number).metrics
        for name, seen in rates.items():
            seen.append(metrics.get(f"{name}/learning_rate"))
    # A step ends after its second update where the policy is trained, after its fourth where it rests.
    expected = [1e-2 * (1 - (4 * number + (3 if number < warmup_steps else 1)) / 16) for number in range(3)]
    assert rates["critic"] == pytest.approx(expected)
    assert rates["policy"][:warmup_steps] == [None] * warmup_steps
    assert rates["policy"][warmup_steps:] == pytest.approx(expected[warmup_steps:])
    last = math.nan
    assert not shop.step(3).applied
    for engine in (shop.policy, shop.critic):
        assert engine._schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_the_critic_learns_to_expect_a_constant_score(make_task, tiny_config, text_scorer):
    from_nothing = make_task(scorer=text_scorer(lambda text: 2.0), kl=KlConfig(coefficient=0.0))
    losses = [from_nothing.step(number).metrics for number in range(8)]
    assert losses[0]["value"] == pytest.approx(0, abs=0.5)
    assert losses[-1]["value"] == pytest.approx(2, abs=0.4)
    assert losses[-1]["critic/loss"] < 0.2 * losses[0]["critic/loss"]


def test_epochs_end_once_the_policy_is_far_from_where_it_was(make_task, tiny_config):
    train = train_of(tiny_config, **ONE_MINIBATCH)

    def step(limit):
        loss = SurrogateConfig(epochs=6, stop_epoch_kl=limit)
        return make_task(loss=loss, train=train).step().metrics

    never, far, at_once = step(None), step(1e6), step(1e-5)
    assert never["minibatches"] == far["minibatches"] == 6
    assert never["epochs_stopped_early"] == far["epochs_stopped_early"] == 0
    assert at_once["minibatches"] == 2, "the first minibatch starts at a distance of 0, the second does not"
    assert at_once["epochs_stopped_early"] == 1


@pytest.mark.parametrize(("last", "sizes"), [("keep", [15, 1]), ("merge", [16]), ("drop", [15])])
def test_a_minibatch_of_one_rollout_is_no_update_of_its_own(make_task, tiny_config, last, sizes):
    shop = make_task(train=train_of(tiny_config, global_batch_size=15, last_batch=last))
    seen, step = [], shop.task._updater._maker.step

    def watched(data, number, **options):
        batches = step(data, number, **options)
        seen.append(shop.task._updater._maker.items)
        return batches

    shop.task._updater._maker.step = watched
    assert shop.step().metrics["minibatches"] == len(sizes)
    assert seen == sizes and shop.config.updates == len(sizes)


@pytest.mark.parametrize("prompts", [24, 64], ids=["last step of an epoch", "more asked for than there are"])
def test_a_step_of_few_prompts_gives_every_rollout_as_many_passes(make_task, tiny_config, prompts):
    """32 prompts are trained on."""
    rollout = replace(tiny_config.rollout, prompts=prompts, samples=1)
    shop = make_task(rollout=rollout, loss=SurrogateConfig(epochs=2))
    last = shop.step(1).metrics if prompts == 24 else shop.step(0).metrics
    assert last["rollouts"] == (8 if prompts == 24 else 32)
    assert last["minibatches"] == 2 * last["rollouts"] / 8


def test_the_average_is_that_of_the_weights_after_each_step(make_task, tmp_path):
    shop = make_task(ema=0.6)
    expected = shop.weights()
    for number in range(3):
        shop.step(number)
        now = shop.weights()
        expected = {name: 0.6 * value + 0.4 * now[name] for name, value in expected.items()}
    shop.task.portions["average"].save(tmp_path)
    shop.task.take_average()
    for name, value in shop.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.allclose(value, now[name], atol=1e-3) for name, value in shop.weights().items())
    again = make_task(ema=0.6)
    again.task.portions["average"].load(tmp_path)
    again.task.take_average()
    assert all(torch.equal(value, shop.weights()[name]) for name, value in again.weights().items())


def test_what_is_judged_is_the_average_and_training_goes_on_with_the_weights_it_had(make_task, tiny_config):
    shop = make_task(ema=0.8, train=train_of(tiny_config, evaluate_every=0))
    for number in range(2):
        shop.step(number)
    trained = shop.weights()
    judged = shop.task.evaluate()
    assert all(torch.equal(value, trained[name]) for name, value in shop.weights().items())
    shop.task.take_average()
    assert any(not torch.equal(value, trained[name]) for name, value in shop.weights().items())
    assert shop.task.evaluate() == judged
    assert judged["eval/kl"] == pytest.approx(kl_by_hand(shop), rel=1e-4)


def kl_by_hand(shop):
    """Of the weights that the policy has now, on the responses to held-out prompts."""
    task = shop.task
    prompts = [task._data.evals.prompt(place) for place in range(len(task._data.evals))]
    rollouts = task._roll_out(prompts, 1, ("held-out",))
    temperature, width = task._config.rollout.temperature, rollouts.mask.shape[1]

    def of_responses(out, batch):
        return by_response(out.logprobs, batch)

    now = ask(task._policy, task._maker, rollouts, of_responses, width, temperature=temperature)
    reference = task._roles.reference.logprobs(task._maker, rollouts, temperature=temperature)
    return float(((now - reference) * rollouts.mask).sum(1).mean())


@pytest.fixture
def conversations(tmp_path, prompt_cache, tiny_config):
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"say {number}", "completion": "good day " * (1 + number % 5)} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExampleDataConfig(
        train=str(path), eval_share=0.0, template=tiny_config.data.template, cache_dir=prompt_cache
    )


SHORT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else ' ') }}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, "plain", SHORT_TEMPLATE])
def test_conversations_without_a_template_of_their_own_have_the_runs(tiny_config, conversations, alone, template):
    chat = load_chat(tiny_config.policy.path, template)
    section = PretrainingConfig(data=replace(conversations, template=None))
    config = replace(tiny_config, pretraining=section)
    prompts = PromptData(None, None, None)
    rows = _Builder(config, alone, chat, prompts, 1).pretraining()
    assert rows.fingerprint == load_examples(section.data, chat, kind="conversation").train.fingerprint
    other = SHORT_TEMPLATE.replace("' '", "' - '")
    own = replace(config, pretraining=replace(section, data=replace(section.data, template=other)))
    with_other = load_chat(tiny_config.policy.path, other)
    expected = load_examples(section.data, with_other, kind="conversation").train.fingerprint
    assert _Builder(own, alone, chat, prompts, 1).pretraining().fingerprint == expected != rows.fingerprint


def test_pretraining_adds_its_weight_times_the_mean_loss_of_response_tokens(make_task, tiny_config, conversations):
    train = train_of(tiny_config, micro_batch_tokens=60, **ONE_MINIBATCH)
    section = PretrainingConfig(data=conversations, weight=0.7, batch_size=20)
    shop = make_task(noise=0.02, train=train, optim=ALMOST_SGD, pretraining=section)
    data = load_examples(conversations, shop.chat, kind="conversation").train
    experience = experience_of(shop)
    hf, before = plain_copy(shop.policy), shop.weights()
    report = Updater(shop.policy, shop.critic, shop.config, data).run(0, experience, 0.1)
    total, tokens = 0.0, 0
    for index in range(20):
        (row,) = data.item(index).rows
        ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
        response = torch.from_numpy(row.response)[1:]
        losses = F.cross_entropy(hf(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total, tokens = total + losses[response].sum(), tokens + int(response.sum())
    surrogate = surrogate_by_hand(shop.config, hf, experience, range(16))
    (surrogate + 0.7 * total / tokens).backward()
    metrics = report.metrics()
    assert metrics["pretraining/loss"] == pytest.approx(float(total.detach()) / tokens, rel=1e-4)
    assert metrics["policy/loss"] == pytest.approx(float(surrogate.detach()), abs=1e-5)
    assert_moved_by(shop.weights(), before, {f"hf.{name}": p.grad for name, p in hf.named_parameters()})


def test_with_adapters_the_reference_is_the_base(make_task, tiny_config, tiny_model):
    lora = replace(tiny_config.policy, lora=LoraOptions(rank=4, alpha=8))
    shop = make_task(policy=lora)
    before = shop.weights()
    first = shop.step(0).metrics
    assert first["kl"] == pytest.approx(0, abs=1e-4), "tokens by themselves against whole texts: rounding"
    after = shop.weights()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    rollouts = shop.rollouts(1)
    base = make_task().policy.module.plain()
    measured = shop.task._measure(rollouts)
    with torch.no_grad():
        expected = [float(chosen_by_hand(base, rollouts, row).sum()) for row in range(16)]
    torch.testing.assert_close(measured.reference.sum(dim=1), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert abs(shop.step(1).metrics["kl"]) > 1e-4


# The pull towards the reference.


def test_the_adaptive_coefficient_follows_the_kl_and_is_part_of_the_state(make_task):
    kl = KlConfig(coefficient=0.1, controller="adaptive", target=0.5, horizon=100)
    shop = make_task(noise=0.02, kl=kl)
    seen = [shop.step(number).metrics for number in range(3)]
    expected = 0.1
    for metrics in seen:
        assert metrics["kl_coefficient"] == pytest.approx(expected)
        expected *= 1 + float(np.clip(metrics["kl"] / 0.5 - 1, -0.2, 0.2)) * 16 / 100
    again = make_task(noise=0.02, kl=kl)
    again.task.load_state_dict(shop.task.state_dict())
    assert again.step(3).metrics["kl_coefficient"] == pytest.approx(expected)


def test_kl_in_the_reward_is_taken_off_each_token(make_task):
    advantage = AdvantageConfig(estimator="reinforce_pp", whiten=False)
    shop = make_task(noise=0.02, kl=KlConfig(coefficient=0.3), advantage=advantage)
    experience = experience_of(shop)
    for row in range(16):
        count = len(experience.rollouts.responses[row].tokens)
        gap = (experience.measured.logprobs - experience.measured.reference)[row, :count]
        for place in range(count):
            expected = float(experience.scored.scores[row]) - 0.3 * float(gap[place:].sum())
            assert float(experience.advantages[row, place]) == pytest.approx(expected, abs=1e-5)


def test_scores_are_clipped_and_charged_for_length_and_missing_ends(make_task, tiny_config):
    reward = RewardSourceConfig(
        function="rules:length", clip=0.4, missing_end_penalty=1.0, length_penalty=0.5, length_free_tokens=4
    )
    shop = make_task(reward=reward)
    experience = experience_of(shop)
    assert {bool(ended) for ended in experience.rollouts.ended} == {True, False}
    for row, response in enumerate(experience.rollouts.responses):
        expected = min(float(experience.scored.scores[row]), 0.4) - (0 if response.ended else 1)
        expected -= 0.5 * min(max((len(response.tokens) - 4) / (10 - 4), 0), 1)
        assert float(experience.rewards[row]) == pytest.approx(expected, abs=1e-6)
