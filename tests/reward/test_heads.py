"""Heads that know how sure they are: against integrals, draws and limits; published, opened and scored with."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from transformers import AutoModelForSequenceClassification

from reward.building import build_reward_model
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
from reward.saving import load_reward_model, save_reward_model
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


def wave(*shape, speed):
    return torch.sin(speed * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(shape)


# What the code of BNRM's authors says of the problem below (reward_models/grm_utils.py at bd51c479: BNValueHead with
# layer_type "linear", dropout and bias at 0, one state a text, in float64): rewards of three states, divergences of
# each and of the dictionary, times 5 (it takes means over factors, ours are sums), and the gradient of
#     sum_i i r_i + .1 sum_i (i + 1) KL_i + .2 KL_dictionary,   i = 1, 2, 3.
# True: drawn, with the uniform numbers below in place of random ones; False: with means.
AUTHORS_REWARDS = {
    True: (6.8254439293280535, 6.959000675261821, 5.8569024952705675),
    False: (6.421020189965013, 6.457490331300507, 6.712621716909065),
}
AUTHORS_DIVERGENCES = (5 * 1.1502474269831144, 5 * 0.9513259069616329, 5 * 0.8561812423098185)
AUTHORS_DICTIONARY = 5 * 9.085601834781773
# fmt: off
AUTHORS_GRADIENTS = {
    True: {
        "factors.weight": (5.337466581599, -5.29565442649, -3.972834748509, 6.319410194673,
            2.822772759234, -4.985630443254, -1.538030692823, 5.38196401691, 1.447482777551,
            -1.031106831877, -1.181777900915, 1.335637983903, 0.391304891745, -0.379662105557,
            -0.293470147757, 0.455286131114, -0.009117650689, -0.031180425336, 0.017152502958,
            0.026760414197),
        "factors.bias": (7.549006618398, 5.644130047838, 1.814909382108, 0.559069581864, 0.018961234034),
        "spread.weight": (-0.608830562571, 0.354422538966, 0.517499776971, -0.48777653309),
        "spread.bias": (-0.681077064958,),
        "dictionary": (23.294102655923, 17.743945790677, 10.858217393948, 0.0, 0.0),
        "slope": (2.520396270323,),
        "level": (3.054855877088,),
    },
    False: {
        "factors.weight": (3.318207587801, -3.89069000196, -2.315619616274, 4.487399678839,
            4.041526196094, -4.845926130967, -2.792784392619, 5.565595916453, 2.073920930979,
            -2.445616589971, -1.443712465428, 2.817645395003, 0.391304891745, -0.379662105557,
            -0.293470147757, 0.455286131114, -0.009117650689, -0.031180425336, 0.017152502958,
            0.026760414197),
        "factors.bias": (5.202899644792, 6.411741940405, 3.262454041394, 0.559069581864, 0.018961234034),
        "spread.weight": (0.422780001203, -0.361765057002, -0.329557129557, 0.446688300401),
        "spread.bias": (0.572908816608,),
        "dictionary": (13.990781883752, 17.330420500901, 27.00764089712, 0.0, 0.0),
        "slope": (0.085362909706,),
        "level": (0.179798754221,),
    },
}
# fmt: on
AUTHORS_VARIANCES = (10.9911, 13.2081, 17.7287)
"""Of 262,499 draws of the rewards by that code; their standard errors are below 1 %."""


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "means"])
def test_rewards_divergences_and_gradients_are_those_of_its_authors_code(monkeypatch, drawn):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr("reward.heads.EULER", 0.5772)  # as they round it
    uniform = {1: 0.5 + 0.49 * wave(5, speed=3.1), 2: 0.5 + 0.49 * wave(3, 5, speed=2.3)}
    monkeypatch.setattr(torch, "rand_like", lambda values: uniform[values.ndim])
    weights = {
        "factors.weight": wave(5, 4, speed=1.1),
        "factors.bias": 2.5 + wave(5, speed=0.7),
        "spread.weight": wave(1, 4, speed=0.9),
        "spread.bias": torch.tensor([0.3], dtype=torch.float64),
        "dictionary": wave(5, speed=0.9),  # two of them below 0
        # Theirs alone: shapes of the dictionary are a network of its weights.
        "slope": torch.tensor([0.8], dtype=torch.float64),
        "level": torch.tensor([-0.4], dtype=torch.float64),
    }
    for tensor in weights.values():
        tensor.requires_grad_()
    own = {name: tensor for name, tensor in weights.items() if name not in ("slope", "level")}
    own["dictionary_shape"] = weights["slope"] * weights["dictionary"].relu() + weights["level"]
    head = NonNegativeHead(4, 5).double().train(drawn)
    rewards, variances, divergences = torch.func.functional_call(head, own, (wave(3, 4, speed=1.7),), {"in_full": True})
    local, dictionary = divergences.unbind(1)
    found = torch.cat([rewards, local, dictionary[:1]]).detach()
    expected = [*AUTHORS_REWARDS[drawn], *AUTHORS_DIVERGENCES, AUTHORS_DICTIONARY]
    assert found.tolist() == pytest.approx(expected, rel=1e-11)
    assert variances.tolist() == pytest.approx(AUTHORS_VARIANCES, rel=0.02)
    places = torch.arange(1, 4, dtype=torch.float64)
    (places @ rewards + 0.1 * (places + 1) @ local + 0.2 * dictionary[0]).backward()
    for name, gradient in AUTHORS_GRADIENTS[drawn].items():
        assert weights[name].grad.flatten().tolist() == pytest.approx(gradient, rel=1e-10, abs=1e-11), name
    assert AUTHORS_GRADIENTS[drawn].keys() == weights.keys()


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
        float(judge(fitted(pairs, weight=1.0)[0], states).variances.mean().detach()) for pairs in (20, 200, 2000)
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
