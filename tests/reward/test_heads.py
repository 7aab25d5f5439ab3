"""Heads that know how sure they are: against integrals, draws and limits; published, opened and scored with."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from transformers import AutoModelForSequenceClassification

from reward.config import MarginConfig, RewardConfig, RewardModelConfig
from reward.heads import (
    Heads,
    NonNegativeHead,
    draws_of_heads,
    judge,
    mean_head,
    weibull_gamma_divergence,
    weibull_moments,
)
from reward.model import build_reward_model, load_reward_model, save_reward_model
from rlhf.config import parse_command_line
from rlhf.core.errors import ConfigError

NO_MARGIN = MarginConfig(kind="none")


@pytest.mark.parametrize(("mean", "shape"), [(0.4, 1.0), (2.0, 3.7), (1.3, 1.01)])
def test_moments_and_divergence_are_those_of_scipys_distributions(mean, shape):
    scale, variance = weibull_moments(torch.tensor(mean).double(), torch.tensor(shape).double())
    weibull = stats.weibull_min(shape, scale=float(scale))
    assert weibull.mean() == pytest.approx(mean) and weibull.var() == pytest.approx(float(variance))
    prior = stats.gamma(1.7, scale=1 / 0.6)
    expected, _ = integrate.quad(lambda x: weibull.pdf(x) * (weibull.logpdf(x) - prior.logpdf(x)), 0, np.inf)
    found = weibull_gamma_divergence(scale, torch.tensor(shape).double(), alpha=1.7, beta=0.6)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def bayesian(width=6, factors=8, seed=0):
    head = NonNegativeHead(width, factors).double()
    head.start(20.0, torch.Generator().manual_seed(seed))
    return head


@pytest.mark.parametrize("factors", [8, 0])
def test_mean_and_variance_of_a_reward_are_those_of_its_draws(factors):
    head = bayesian(factors=factors)
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.no_grad():
        known = judge(head.eval(), states)
        head.train()
        draws = torch.stack([head(states).squeeze(-1) for _ in range(4_000)])
    torch.testing.assert_close(draws.mean(0), known.rewards, rtol=0, atol=5 * float(draws.std()) / 4_000**0.5 * 3)
    torch.testing.assert_close(draws.var(0), known.variances, rtol=0.15, atol=1e-6)
    assert float(known.variances.min()) > 0


def test_without_local_factors_the_mean_is_a_linear_head_and_with_sure_ones_a_head_of_two_layers():
    states = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for factors in (0, 8):
        head = bayesian(factors=factors).eval().float()
        plain = mean_head(head)
        torch.testing.assert_close(plain(states), head(states), rtol=1e-5, atol=1e-6)
        assert isinstance(plain, torch.nn.Linear) is (factors == 0)
    sure = bayesian().train()
    with torch.no_grad():
        sure.dictionary_shape.fill_(1e4)
        sure.spread.weight.zero_()
        sure.spread.bias.fill_(1e4)
        found = judge(sure, states)
    torch.testing.assert_close(found.rewards, mean_head(sure.float())(states).squeeze(-1), rtol=2e-3, atol=1e-3)
    assert float(found.variances.max()) < 1e-5


def fitted(pairs, *, weight, factors=0, noise=0.0, steps=250, seed=0):
    """A head fitted to pairs whose true reward is a sum of three of six features, not negative ones."""
    draw = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, pairs, 6, generator=draw).abs()
    truth = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    right = torch.rand(pairs, generator=draw) < torch.sigmoid((chosen - rejected) @ truth)
    right ^= torch.rand(pairs, generator=draw) < noise
    up, down = torch.where(right[:, None], chosen, rejected), torch.where(right[:, None], rejected, chosen)
    torch.manual_seed(seed)
    head = NonNegativeHead(6, factors)
    head.start(1.0, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(steps):
        judged = judge(head, torch.cat([up, down]))
        above, below = judged.rewards.split(pairs)
        local, dictionary = judged.divergences.unbind(1)
        loss = -torch.nn.functional.logsigmoid(above - below).mean() + weight * (
            local.sum() / pairs + dictionary[0] / pairs
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval(), truth


def test_the_variance_shrinks_with_data():
    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(9)).abs()
    variances = [
        float(judge(fitted(pairs, weight=1.0)[0], states).variances.mean().detach())
        for pairs in (20, 200, 2000)
    ]
    assert variances[0] > 2 * variances[1] > 4 * variances[2] > 0


def test_a_made_up_sparse_reward_is_found_under_wrong_labels():
    head, truth = fitted(2000, weight=1.0, noise=0.2)
    weight = mean_head(head).weight.detach().squeeze()
    found = weight / weight.norm()
    assert float(found @ truth / truth.norm()) > 0.98


def build(path, **options):
    config = RewardModelConfig(path=str(path), head_init_scale=30.0, **options)
    return build_reward_model(config, dtype=torch.float32, pad_token_id=0, vocabulary=259, seed=0).eval()


def tokens():
    rows = torch.randint(3, 250, (4, 9), generator=torch.Generator().manual_seed(3))
    return rows, torch.ones(4, 9, dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"head": "bnrm", "head_hidden": 0}, {"heads": 3}], ids=["bnrm", "heads"])
def test_plain_transformers_opens_what_a_linear_mean_was_published_from(tiny_model, tmp_path, options):
    model = build(tiny_model, **options)
    expected = model.score(*tokens())
    assert float(expected.std()) > 1e-3
    save_reward_model(model, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    plain.config.pad_token_id = 0
    logits = plain(input_ids=tokens()[0]).logits.mean(dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_reward_model(tmp_path).eval().score(*tokens()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_bayesian_head_is_refused_by_plain_transformers_and_opened_with_its_variance(tiny_model, tmp_path):
    model = build(tiny_model, head="bnrm", head_hidden=16)
    expected = model.score_in_full(*tokens())
    save_reward_model(model, tmp_path)
    with pytest.raises((ValueError, KeyError), match="margin-rlhf-bnrm-reward"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found = load_reward_model(tmp_path).eval().score_in_full(*tokens())
    torch.testing.assert_close(found.rewards, expected.rewards)
    torch.testing.assert_close(found.variances, expected.variances)
    assert float(found.variances.min()) > 0


def test_draws_of_heads_are_poisson_numbers_of_the_pair_alone():
    draws = draws_of_heads(3, torch.arange(30_000), seed=5)
    counts = torch.bincount(draws[:, 1].long())[:5] / len(draws)
    expected = torch.tensor([math.exp(-1) / math.factorial(number) for number in range(5)])
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.01)
    assert float(torch.corrcoef(draws.T).fill_diagonal_(0).abs().max()) < 0.03
    some = torch.tensor([7, 29_000, 3])
    torch.testing.assert_close(draws_of_heads(3, some, seed=5), draws[some])
    assert (draws_of_heads(3, some, seed=6) != draws[some]).any()


def step(engine, task):
    total = 0.0
    for batch in task.micro_batches(0):
        loss = task.loss(batch)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])


def test_several_heads_learn_each_from_its_own_draw_however_the_batch_is_cut(make_task):
    small, whole = (step(*make_task(size, margin=NO_MARGIN, heads=3)) for size in (150, 99999))
    assert small[0] == pytest.approx(whole[0], rel=1e-5)
    assert (small[1] - whole[1]).abs().max() < 1e-5 * whole[1].abs().max()
    engine, task = make_task(99999, margin=NO_MARGIN, heads=3)
    [batch] = task.micro_batches(0)
    scores = engine.forward(batch.buckets)
    draws = draws_of_heads(3, batch.indices, task._config.train.seed)
    expected = 0.0
    for head in range(3):
        chosen, rejected = batch.sides(scores.each[:, head].detach().double())
        expected += float((draws[:, head] * -(chosen - rejected).sigmoid().log()).mean()) / 3
    assert float(task.loss(batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_divergences_enter_the_loss_once_for_each_pair_however_the_batch_is_cut(make_task):
    def losses(size, weight):
        engine, task = make_task(size, margin=NO_MARGIN, head="bnrm", head_hidden=8, kl_weight=weight)
        engine.module.eval()
        return sum(float(task.loss(batch).detach()) for batch in task.micro_batches(0)), engine, task

    small, whole, without = losses(150, 0.5)[0], losses(99999, 0.5), losses(99999, 0.0)[0]
    assert small == pytest.approx(whole[0], rel=1e-4)
    _, engine, task = whole
    [batch] = task.micro_batches(0)
    divergences = engine.forward(batch.buckets).divergences.detach().double()
    expected = divergences[:, 0].sum() / len(batch) + divergences[0, 1] / len(task._train)
    assert whole[0] - without == pytest.approx(0.5 * float(expected), rel=1e-4)


def test_rewards_of_a_bayesian_head_are_drawn_in_training_and_not_outside(make_task):
    engine, task = make_task(99999, margin=NO_MARGIN, head="bnrm", head_hidden=8)
    [batch] = task.micro_batches(0)
    drawn = [engine.forward(batch.buckets).rewards.detach() for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()
    engine.module.eval()
    means = [engine.forward(batch.buckets).rewards.detach() for _ in range(2)]
    torch.testing.assert_close(*means, rtol=0, atol=0)


@pytest.mark.dist
def test_a_bayesian_head_that_draws_means_is_trained_by_two_ranks_as_by_one(
    tiny_model, tiny_pairs, run_ranks, runs, tmp_path
):
    worker = str(Path(__file__).parent / "workers" / "draw_means.py")
    settings = [f"model.path={tiny_model}", f"data.train={tiny_pairs}", "data.eval_share=0.2"]
    settings += [f"data.cache_dir={tmp_path}/cache", "margin.kind=none"]
    settings += ["model.head=bnrm", "model.head_hidden=8", "model.kl_weight=0.01"]
    settings += ["train.global_batch_size=10", "train.max_steps=4", "train.publish=none", "optim.learning_rate=3e-3"]
    for ranks, tokens in ((1, 99999), (2, 150)):
        run_ranks([worker, f"output={tmp_path}/{ranks}", f"train.micro_batch_tokens={tokens}", *settings], ranks)
    one, two = (runs.rows(tmp_path / str(ranks)) for ranks in (1, 2))
    runs.assert_close(two, one, 2e-4)
    assert len({row["loss"] for row in one}) == 4, "nothing was trained"


BASE = ("output=o", "model.path=m", "data.train=d")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.head=mlp", "model.head_hidden=0"), "head_hidden = 0 is for head = bnrm"),
        (("model.head=mlp", "model.heads=3"), "heads = 3 needs head = linear"),
        (("model.heads=3", "loss.kind=bsr"), "loss.kind = bsr reads more of a batch"),
        (("model.heads=0",), "model.heads = 0"),
        (("model.kl_weight=-1",), "model.kl_weight = -1"),
    ],
)
def test_heads_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_command_line(RewardConfig, [*BASE, *settings], program="x", description="")


def test_heads_that_are_one_are_that_one():
    several = Heads(4, 3, bias=False)
    states = torch.randn(2, 4)
    torch.testing.assert_close(mean_head(several)(states).squeeze(-1), several(states).mean(-1))
    assert mean_head(plain := torch.nn.Linear(4, 1)) is plain
