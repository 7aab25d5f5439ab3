"""The step of the preference stage, objective by objective."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from policy.preference.columns import row_sums
from policy.preference.config import (
    DeltaConfig,
    LossConfig,
    PreferenceConfig,
    ReferenceConfig,
    TermConfig,
    WatchConfig,
)
from policy.preference.losses import LOSSES
from policy.preference.reference import LiveReference
from policy.preference.schedules import DeltaSchedule
from policy.preference.task import PreferenceTask
from policy.preference.watch import Watch
from rlhf.config import load_config
from rlhf.core.errors import TrainingStopped
from rlhf.data.examples import load_examples
from rlhf.data.options import ExampleDataConfig
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.train.chat import load_chat
from rlhf.train.packing import allow_packing
from tests.waits import losses_without_numbers, waits_of_a_step

SHIPPED = Path(__file__).parents[3] / "launch" / "recipes"
PAIRED = sorted(name for name, objective in LOSSES.items() if not objective.unpaired)


def one_step(engine, task, step=0):
    """Loss and gradient of a step, without the update."""
    batches = task.micro_batches(step)
    for place, batch in enumerate(batches):
        engine.backward(task.loss(batch), last=place == len(batches) - 1)
    gradients = [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]
    metrics = task.step_metrics()
    engine.module.zero_grad()
    return len(batches), metrics, torch.cat([gradient.flatten() for gradient in gradients])


def logprobs_by_hand(model, pair):
    """Log-probabilities of both responses, from whole logits."""
    found = []
    sides = ((pair.chosen, pair.chosen_response_start), (pair.rejected, pair.rejected_response_start))
    hf = model.plain()
    for tokens, start in sides:
        ids = torch.from_numpy(tokens).long()[None]
        logprobs = hf(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        found.append(logprobs[start - 1 :].sum())
    return torch.stack(found)


def test_the_loss_is_dpo_of_log_probabilities_from_whole_logits(make_task, tiny_policy, tiny_data):
    engine, task = make_task()
    (indices,) = [torch.cat([batch.indices for batch in task.micro_batches(0)])]
    _, metrics, gradient = one_step(engine, task)
    policy, reference = tiny_policy(0.03), tiny_policy()
    losses = []
    for index in indices.tolist():
        pair = tiny_data.train.pair(index)
        ratios = logprobs_by_hand(policy, pair) - logprobs_by_hand(reference, pair).detach()
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])))
    loss = torch.stack(losses).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PAIRED)
def test_micro_batches_change_neither_loss_nor_gradient(make_task, kind):
    loss = LossConfig(kind=kind, scope="global_batch")
    counts, metrics, gradients = zip(*(one_step(*make_task(budget, loss=loss)) for budget in (150, 5000)), strict=True)
    assert counts[0] > counts[1] == 1
    assert math.isclose(metrics[0]["loss"], metrics[1]["loss"], rel_tol=1e-4, abs_tol=1e-6)
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * scale)
    assert scale > 0


def test_a_scope_of_micro_steps_sees_only_the_pairs_at_hand(make_task):
    def loss_with(scope):
        loss = LossConfig(kind="aot_unpaired", parameters={"beta": 1.0}, scope=scope)
        return one_step(*make_task(150, loss=loss))[1]["loss"]

    assert not math.isclose(loss_with("micro_step"), loss_with("global_batch"), rel_tol=1e-3)


def test_likelihoods_are_those_of_whole_responses_whatever_the_tail_weight(make_task):
    """nll_weight, sft and WPO beside LD-DPO: what they add does not depend on its alpha."""

    def loss_of(**options):
        return one_step(*make_task(5000, loss=LossConfig(kind="sigmoid", **options)))[1]["loss"]

    sft = (TermConfig(kind="sft", weight=0.5),)
    added = {
        alpha: [
            loss_of(tail_weight=alpha, **more) - loss_of(tail_weight=alpha)
            for more in ({"nll_weight": 0.5}, {"add": sft})
        ]
        for alpha in (1.0, 0.3, 0.0)
    }
    assert loss_of(tail_weight=0.0) != pytest.approx(loss_of(), rel=1e-4)
    for by_nll, by_sft in added.values():
        assert by_nll == pytest.approx(by_sft, rel=1e-4) and by_nll == pytest.approx(added[1.0][0], rel=1e-4)


@pytest.mark.parametrize("largest", [None, 1.0, 0.2])
def test_wpo_weights_of_whole_responses_with_a_bound(make_task, largest):
    def weights_of(alpha):
        task = make_task(5000, loss=LossConfig(kind="sigmoid", wpo=True, wpo_max=largest, tail_weight=alpha))[1]
        (batch,) = task.micro_batches(0)
        sums, output = task._ask(batch)
        view = task._view(sums, batch)
        return task._wpo_weights(view.columns | view.plain, output, batch), task.loss(batch), view

    plain, _, _ = weights_of(1.0)
    cut, loss, view = weights_of(0.3)
    torch.testing.assert_close(cut, plain)
    gaps = view.columns["chosen_logratios"] - view.columns["rejected_logratios"]
    expected = (plain * -torch.nn.functional.logsigmoid(0.1 * gaps)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert largest is None or float(plain.max()) <= largest + 1e-6
    assert largest != 0.2 or torch.allclose(plain, torch.tensor(0.2)), "the bound was never met"


def test_logged_log_probabilities_are_those_of_whole_responses(make_task):
    found = [one_step(*make_task(5000, loss=LossConfig(kind="sigmoid", tail_weight=alpha)))[1] for alpha in (1.0, 0.0)]
    for name in ("logprobs/chosen", "logprobs/rejected_per_token", "logprobs/chosen_drift"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_a_likelihood_alone_is_a_gradient(make_task):
    """Also of pairs whose objective is at rest, and of the tail that LD-DPO leaves out."""
    options = {"kind": "hinge", "parameters": {"width": 0.0}, "tail_weight": 0.0}
    alone = one_step(*make_task(5000, loss=LossConfig(**options)))[1]
    beside = one_step(*make_task(5000, loss=LossConfig(**options, nll_weight=0.1)))[1]
    assert alone["zero_gradient_share"] > 0 == beside["zero_gradient_share"]


MODIFIED = {
    "weighted sum": LossConfig(
        kind="sigmoid", weight=0.8, add=(TermConfig(kind="bco_pair", weight=0.2), TermConfig(kind="sft")),
        scope="global_batch",
    ),
    "nll": LossConfig(kind="sigmoid", nll_weight=0.5),
    "wpo": LossConfig(kind="sigmoid", wpo=True),
    "tail weight": LossConfig(kind="sigmoid", tail_weight=0.3),
    "divergence": LossConfig(kind="sigmoid", divergence="js"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODIFIED)
def test_every_modifier_changes_the_gradient_alike_in_all_micro_batches(make_task, name):
    plain = one_step(*make_task(5000, loss=LossConfig(kind="sigmoid")))[2]
    small, large = (one_step(*make_task(budget, loss=MODIFIED[name]))[2] for budget in (150, 5000))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4 * float(large.abs().max()))
    assert not torch.allclose(large, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


def test_a_weighted_sum_adds_up(make_task):
    def loss_of(loss):
        return one_step(*make_task(5000, loss=loss))[1]["loss"]

    parts = loss_of(LossConfig(kind="sigmoid")), loss_of(LossConfig(kind="apo_zero"))
    both = loss_of(LossConfig(kind="sigmoid", weight=0.5, add=(TermConfig(kind="apo_zero", weight=2.0),)))
    assert math.isclose(both, 0.5 * parts[0] + 2 * parts[1], rel_tol=1e-5)


def test_pairs_past_the_hinge_are_counted_as_resting(make_task):
    near = one_step(*make_task(loss=LossConfig(kind="apo_hinge_zero", parameters={"margin": 100.0})))[1]
    assert near["zero_gradient_share"] == 0
    far = one_step(*make_task(loss=LossConfig(kind="hinge", parameters={"width": 0.0})))[1]
    assert far["zero_gradient_share"] == pytest.approx(far["accuracy"])


def test_delta_warms_up_from_zero(make_task):
    loss = LossConfig(kind="margin_sigmoid", delta=DeltaConfig(schedule="warmup", warmup_share=0.5))
    engine, task = make_task(loss=loss)
    assert [round(one_step(engine, task, step)[1]["delta"], 6) for step in (0, 5, 10, 15)] == [0, 0.05, 0.1, 0.1]


@pytest.mark.parametrize("peak", [0.1, 0.4])
def test_a_quantile_delta_does_not_jump_and_never_lets_more_than_about_that_share_rest(peak):
    """Pairs that start alike and are told apart better and better, some sooner than others."""
    schedule = DeltaSchedule(DeltaConfig(schedule="quantile", quantile=0.2, decay=0.9), peak, 0.1, 200)
    leads = 60 * torch.linspace(-0.2, 1.0, 101)
    deltas, shares, fixed = [], [], []
    for step in range(200):
        schedule.start_step(step)
        gaps = leads * (1 - math.exp(-step / 60))
        losses = -torch.nn.functional.logsigmoid(0.1 * gaps)
        deltas.append(schedule.value)
        shares.append(float((losses < schedule.value).float().mean()))
        fixed.append(float((losses < peak).float().mean()))
        schedule.end_step(gaps)
    assert deltas[:5] == [peak] * 5, "all losses are log 2 at first: there is nothing to follow yet"
    moves = [before - after for before, after in itertools.pairwise(deltas)]
    assert min(moves) >= 0 and max(moves) < 0.1 * peak
    assert shares[0] == 0 and max(shares) < 0.4 and all(0.2 <= share < 0.25 for share in shares[120:])
    assert fixed[-1] >= 0.5, "with a fixed delta half of them would rest, or more"


def test_by_the_recipe_pairs_rest_that_are_told_apart_and_no_others(make_task):
    """The report's claim, for the settings of the shipped recipe, in a run long enough to tell pairs apart."""
    recipe = SHIPPED / "preference_margin_sigmoid.yaml"
    loss = load_config(PreferenceConfig, [recipe], [], program="test").loss
    engine, task = make_task(loss=replace(loss, delta=DeltaConfig()), optim=OptimizerConfig(learning_rate=1e-2))
    delta, beta = loss.values["delta"], loss.values["beta"]
    resting = []
    for step in range(16):
        batches = task.micro_batches(step)
        for place, batch in enumerate(batches):
            engine.backward(task.loss(batch), last=place == len(batches) - 1)
        seen = task._rows.gathered()
        losses = -torch.nn.functional.logsigmoid(beta * (seen["chosen_logratios"] - seen["rejected_logratios"]))
        metrics = task.step_metrics()
        engine.step()
        assert metrics["zero_gradient_share"] == pytest.approx(float((losses < delta).float().mean()))
        resting.append(metrics["zero_gradient_share"])
    assert resting[0] == 0 and any(0 < share < 1 for share in resting), "none or all rested: nothing was tested"


def test_held_out_metrics_do_not_depend_on_the_token_budget(make_task):
    found = [make_task(budget)[1].evaluate() for budget in (150, 5000)]
    assert found[0].keys() == found[1].keys() > {"eval/accuracy", "eval/chosen_drift_per_token"}
    for name, value in found[0].items():
        assert math.isclose(value, found[1][name], rel_tol=1e-4, abs_tol=1e-5), name


def test_drift_is_zero_where_policy_and_reference_are_one(make_task):
    metrics = one_step(*make_task(noise=0.0))[1]
    assert metrics["logprobs/chosen_drift"] == metrics["kl"] == metrics["gap"] == 0
    assert math.isclose(metrics["loss"], math.log(2), rel_tol=1e-6)


def test_a_moving_reference_catches_up_and_is_part_of_the_state(make_task, tmp_path):
    moving = ReferenceConfig(kind="live", sync_every=2, sync_share=1.0)
    engine, task = make_task(reference=moving)
    drifts = [one_step(engine, task, step)[1]["logprobs/chosen_drift"] for step in (0, 1, 2)]
    assert drifts[0] != 0 and drifts[1] != 0 and drifts[2] == 0
    again_engine, again = make_task(reference=moving)
    again.load_state_dict(task.state_dict())
    task.portions["reference"].save(tmp_path)
    again.portions["reference"].load(tmp_path)
    assert one_step(again_engine, again, 1)[1]["logprobs/chosen_drift"] == 0


def test_a_reference_free_objective_counts_drift_from_its_first_step(make_task):
    engine, task = make_task(loss=LossConfig(kind="simpo"))
    first = one_step(engine, task)[1]
    assert "logprobs/chosen_drift_per_token" not in first
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter *= 1.05
    second = one_step(engine, task)[1]
    drift = second["logprobs/chosen_per_token"] - first["logprobs/chosen_per_token"]
    assert second["logprobs/chosen_drift_per_token"] == pytest.approx(drift)


def test_a_step_whose_policy_is_not_finite_ends_in_a_loss_that_is_not(make_task):
    engine, task = make_task(loss=LossConfig(kind="ot_margin"))
    with torch.no_grad():
        next(engine.module.parameters()).fill_(math.nan)
    (batch, *_) = task.micro_batches(0)
    assert not torch.isfinite(task.loss(batch))


def test_held_out_log_probabilities_that_are_not_finite_name_a_row(make_task):
    engine, task = make_task()
    with torch.no_grad():
        next(engine.module.parameters()).fill_(math.nan)
    with pytest.raises(TrainingStopped, match=r"pairs\.jsonl:\d+: the policy has broken down"):
        task.evaluate()


SINKING = {"logprobs/chosen_drift_per_token": -0.5, "zero_gradient_share": 0.95}


def test_the_watch_names_symptom_and_setting_once(alone, caplog):
    watch = Watch(WatchConfig(), alone)
    for step in range(1, 4):
        watch.look(step, SINKING)
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1", "step 1"]
    assert "loss.nll_weight" in caplog.text and "loss.parameters.margin" in caplog.text


def test_one_odd_batch_is_no_symptom_and_stop_means_stop(alone, caplog):
    healthy = {"logprobs/chosen_drift_per_token": 0.0, "zero_gradient_share": 0.0}
    watch = Watch(WatchConfig(action="stop"), alone)
    watch.look(1, healthy)
    watch.look(2, SINKING)
    with pytest.raises(TrainingStopped, match="chosen responses have become less likely"):
        for step in range(3, 9):
            watch.look(step, SINKING)


@pytest.fixture
def unpaired_task(tmp_path, tiny_config, tiny_policy, alone):
    """Every fourth row has the label false."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"write about {word} {place}", "completion": f"{word} is good {word}", "label": place % 4 > 0}
        for place, word in enumerate(["sun", "rain", "tax", "day", "form", "sad"] * 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(budget, scope="global_batch", packing="auto"):
        data = ExampleDataConfig(train=str(path), eval_share=0.4, cache_dir=tiny_config.data.cache_dir)
        train = replace(tiny_config.train, micro_batch_tokens=budget, packing=packing)
        loss = LossConfig(kind="kto", scope=scope, parameters={"undesirable_weight": 2.0})
        config = replace(tiny_config, data=None, unpaired=data, train=train, loss=loss)
        loaded = load_examples(data, load_chat(tiny_config.model.path), kind="unpaired")
        engine = LocalEngine(tiny_policy(0.03), ranks=alone, optimizer=config.optim, total_steps=20)
        reference = LiveReference(ReplicatedModel(tiny_policy(), alone))
        assert allow_packing(engine) and allow_packing(reference.model)
        return engine, PreferenceTask(engine, config, loaded.train, loaded.evals, (reference, reference), 20)

    return make


def test_kto_does_not_depend_on_micro_batches(unpaired_task):
    counts, metrics, gradients = zip(*(one_step(*unpaired_task(budget)) for budget in (120, 5000)), strict=True)
    assert counts[0] > counts[1] == 1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
    assert math.isclose(metrics[0]["kl"], metrics[1]["kl"], rel_tol=1e-4)
    assert {"reward/desirable", "reward/undesirable", "logprobs/chosen_drift"} <= metrics[0].keys()


def test_kto_is_the_formula_on_matched_and_mismatched_rows(unpaired_task, tiny_policy):
    engine, task = unpaired_task(5000)
    (batch,) = task.micro_batches(0)
    policy, reference = (row_sums(tiny_policy(noise)(batch.buckets), batch) for noise in (0.03, 0.0))
    ratios = (policy.head + policy.tail - reference.head - reference.tail).detach()
    kl = ratios[1].mean().clamp_min(0)
    signs = batch.labels.float() * 2 - 1
    weights = torch.where(batch.labels, 1.0, 2.0)
    expected = (weights * (1 - torch.sigmoid(0.1 * signs * (ratios[0] - kl)))).mean()
    assert math.isclose(one_step(engine, task)[1]["loss"], float(expected), rel_tol=1e-4)


def test_kto_goes_back_through_the_responses_alone(unpaired_task):
    """Its mismatched rows are read by the KL, which is a constant: they have no backward pass."""
    engine, task = unpaired_task(300)
    forward, seen = engine.forward, []

    def watched(buckets, **options):
        seen.append((torch.is_grad_enabled(), [bucket.tokens for bucket in buckets]))
        return forward(buckets, **options)

    engine.forward = watched
    for number in range(2):
        seen.clear()
        batches = task.micro_batches(number)
        seen.clear()
        for batch in batches:
            task.loss(batch)
        assert len(batches) > 1 and len(seen) == 2 * len(batches)
        learned = [len(tokens) for with_gradient, buckets in seen if with_gradient for tokens in buckets]
        rows = sum(len(batch) for batch in batches)
        assert rows <= sum(learned) <= rows + len(learned), "one row for each response, and fillers"
        assert len(learned) == sum(len(batch.buckets) for batch in batches), "ranks make equally many forwards"


def test_held_out_labels_are_judged_by_auc(unpaired_task):
    _, task = unpaired_task(5000)
    metrics = task.evaluate()
    assert metrics["eval/auc"] == task.evaluation.auc
    assert 0 <= metrics["eval/auc"] <= 1 and task.evaluation.accuracy.pairs == 12


# Prompts that both answers of a pair share.


@pytest.mark.parametrize("kind", ["sigmoid", "margin_sigmoid", "simpo", "ot_margin"])
def test_a_prompt_that_is_computed_once_changes_neither_loss_nor_gradient(make_task, tiny_config, kind):
    found = {}
    for packing in ("off", "auto"):
        sections = {"train": replace(tiny_config.train, packing=packing), "loss": LossConfig(kind=kind)}
        engine, task = make_task(100_000, **sections)
        assert all((batch.buckets.packing is not None) == (packing == "auto") for batch in task.micro_batches(0))
        found[packing] = one_step(engine, task)
    (_, apart, own), (_, together, shared) = found["off"], found["auto"]
    assert together["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert (own - shared).abs().max() < 2e-5 * own.abs().max()
    assert together["tokens"] == apart["tokens"] and together["shared_share"] > 0.05
    assert together["padding_share"] == 0 < apart["padding_share"]


@pytest.mark.parametrize("budget", [300, 100_000])
def test_responses_of_kto_are_packed_by_themselves_and_so_are_mismatched_ones(unpaired_task, budget):
    (_, apart, own), (_, together, shared) = (
        one_step(*unpaired_task(budget, packing=packing)) for packing in ("off", "auto")
    )
    assert together["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert (own - shared).abs().max() < 2e-5 * own.abs().max()
    assert together["shared_share"] > 0.05 and together["padding_share"] == 0 < apart["padding_share"]


def test_the_host_waits_twice_in_a_step_however_many_micro_batches_it_has(make_task):
    """Once for the length of the gradient, and once for all metrics."""
    few, many = (waits_of_a_step(*make_task(budget)) for budget in (100_000, 150))
    assert len(few) == len(many) == 2, "\n".join(many)


CARRIED = ("alpha_dpo", "bco_pair", "ot_margin")
"""Objectives with a number from step to step, or margins that are made on the host: the device is waited for."""


@pytest.mark.full
@pytest.mark.parametrize("kind", sorted({*PAIRED} - {*CARRIED}))
def test_a_loss_and_its_gradient_need_no_number_and_no_second_device(make_task, kind):
    engine, task = make_task(150, loss=LossConfig(kind=kind))
    others = [] if task._reference is None else [task._reference.model]
    losses = losses_without_numbers(engine, task, *others)
    assert len(losses) > 3 and all(loss.is_meta for loss in losses)
