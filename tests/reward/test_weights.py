"""Weights of pairs: what they are, and that ranks, micro-batches and queues do not change them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reward.config import MarginConfig, RewardConfig, WeightConfig
from reward.weights import transport_weights
from rlhf.config import parse_command_line
from rlhf.core.errors import ConfigError

GLOBAL = WeightConfig(kind="transport", parameters={"scope": "global_batch", "mass": 0.6})


def test_pairs_that_the_model_contradicts_count_less_and_the_mean_is_one():
    gaps = torch.linspace(-3, 3, 13, dtype=torch.float64)
    zeros = torch.zeros(13, 4, dtype=torch.float64)
    found = transport_weights(zeros, zeros, gaps / 2, -gaps / 2, mass=0.7).weights
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-4)
    assert (found.diff() > -1e-6).all() and found[0] < 0.2 < 1.2 < found[-1]
    alike = transport_weights(zeros, zeros, gaps / 2, -gaps / 2, mass=1.0).weights
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=0, atol=1e-4)


def gradient(task, engine):
    total = 0.0
    for batch in task.micro_batches(0):
        loss = task.loss(batch)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])


def test_weights_over_the_global_batch_do_not_depend_on_micro_batches(make_task):
    small, whole = (gradient(*reversed(make_task(size, weights=GLOBAL))) for size in (150, 99999))
    plain = gradient(*reversed(make_task(99999)))
    assert small[0] == pytest.approx(whole[0], rel=1e-5)
    assert (small[1] - whole[1]).abs().max() < 1e-5 * whole[1].abs().max() < (plain[1] - whole[1]).abs().max()


def test_weights_times_losses_are_what_is_learned(make_task):
    engine, task = make_task(99999, weights=GLOBAL, margin=MarginConfig(kind="none"))
    [batch] = task.micro_batches(0)
    found = float(task.loss(batch).detach())
    scores = engine.forward(batch.buckets)
    chosen, rejected = (side.detach().double() for side in batch.sides(scores.rewards))
    sides = (side.detach().double() for side in batch.sides(scores.embeddings))
    weights = transport_weights(*sides, chosen, rejected, mass=0.6).weights
    assert found == pytest.approx(float((weights * -(chosen - rejected).sigmoid().log()).mean()), rel=1e-4)
    assert float(weights.std()) > 0.05


def test_weights_come_in_over_the_warm_up_and_a_queue_is_kept(make_task):
    config = replace(GLOBAL, parameters={"queue_pairs": 6, "mass": 0.6}, warmup_share=0.5)
    _engine, task = make_task(99999, weights=config)
    spreads = []
    for step in range(2):
        [batch] = task.micro_batches(step)
        task.loss(batch)
        spreads.append(float(task._weights.of(batch.positions).std()))
    assert 0 < spreads[0] < spreads[1]
    state = task.state_dict()
    assert [len(part) for part in state["weights"]["queue"]] == [6, 6]
    _engine, other = make_task(99999, weights=config)
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict()["weights"]["queue"], state["weights"]["queue"])


STAGES = {
    "reward": ["margin.kind=none", "model.head_init_scale=10", "model.heads=2"],
    "policy.preference": ["loss.kind=sigmoid", "loss.parameters.beta=0.5"],
}


@pytest.mark.dist
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_weigh_pairs_as_one_does(tiny_pairs, tiny_model, run_ranks, runs, tmp_path, stage):
    settings = [f"model.path={tiny_model}", f"data.train={tiny_pairs}", "data.eval_share=0.2"]
    settings += [f"data.cache_dir={tmp_path}/cache", "weights.kind=transport"]
    settings += ["weights.parameters.scope=global_batch", "weights.parameters.mass=0.6", "optim.learning_rate=3e-3"]
    settings += ["train.global_batch_size=10", "train.micro_batch_tokens=300", "train.max_steps=4"]
    settings += ["train.publish=none", *STAGES[stage]]
    for ranks in (1, 2):
        run_ranks(["-m", stage, f"output={tmp_path}/{ranks}", *settings], ranks)
    rows = [runs.rows(Path(tmp_path / str(ranks))) for ranks in (1, 2)]
    assert rows[0][-1]["weight/lowest"] < 0.7, "nothing was left behind"
    runs.assert_close(*rows, 2e-4)


BASE = ("output=o", "model.path=m", "data.train=d")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("weights.kind=transport", "weights.parameters.mass=1.5"), r"weights\.parameters\.mass = 1\.5"),
        (("weights.kind=transport", "weights.parameters.mas=0.5"), "did you mean mass"),
        (("weights.kind=transprt",), "did you mean transport"),
        (
            (
                "weights.kind=transport",
                "weights.parameters.scope=global_batch",
                "weights.parameters.queue_pairs=5",
            ),
            "queue_pairs = 5 needs parameters.scope = micro_step",
        ),
        (
            ("weights.kind=transport", "weights.parameters.scope=global_batch", "margin.parameters.queue_pairs=5"),
            "margin.parameters.queue_pairs = 5 needs the scope",
        ),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_command_line(RewardConfig, [*BASE, *settings], program="x", description="")
