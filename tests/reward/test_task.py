import pytest
import torch

from reward import margin_maker
from reward.config import LossConfig, MarginConfig
from reward.margin_log import STEPS, MarginLog
from reward.margins import optimal_transport_margins
from reward.tables import LOSSES
from rlhf.core.errors import TrainingStopped
from rlhf.engine.ranks import single_rank
from tests.waits import losses_without_numbers, waits_of_a_step

GLOBAL_OT = MarginConfig(kind="ot", parameters={"scope": "global_batch"})
NO_MARGIN = MarginConfig(kind="none")


def gradients_of_step(engine, task, step=0):
    """Loss and flat gradient of one global batch, without an update."""
    engine.module.zero_grad()
    batches = task.micro_batches(step)
    for batch in batches:
        task.loss(batch).backward()
    flat = torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])
    return task.step_metrics(), flat, len(batches)


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_loss_and_gradient_do_not_depend_on_the_token_budget(make_task, kind):
    margin = GLOBAL_OT if LOSSES[kind].takes_margins else NO_MARGIN
    small = gradients_of_step(*make_task(150, loss=LossConfig(kind=kind), margin=margin))
    whole = gradients_of_step(*make_task(100_000, loss=LossConfig(kind=kind), margin=margin))
    assert small[2] > 3 and whole[2] == 1
    assert small[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert (small[1] - whole[1]).abs().max() < 1e-5 * whole[1].abs().max()


def test_global_margins_are_those_of_one_plan_over_all_pairs(make_task):
    _engine, task = make_task(150, margin=GLOBAL_OT)
    task.micro_batches(0)
    ((pairs, margins),) = task._seen
    expected = optimal_transport_margins(
        pairs.chosen_embeddings, pairs.rejected_embeddings, pairs.chosen_rewards, pairs.rejected_rewards
    ).margins
    assert len(margins) == 10
    torch.testing.assert_close(margins, expected)


def test_micro_step_margins_depend_on_what_is_held_at_once(make_task):
    small = gradients_of_step(*make_task(150))[0]
    whole = gradients_of_step(*make_task(100_000))[0]
    assert abs(small["margin/mean"] - whole["margin/mean"]) > 1e-4


def test_a_queue_widens_the_plan_and_is_restored(make_task):
    margin = MarginConfig(kind="ot", parameters={"queue_pairs": 6})
    engine, task = make_task(150, margin=margin)
    first = gradients_of_step(engine, task)
    again = gradients_of_step(engine, task)
    assert first[0]["margin/mean"] != again[0]["margin/mean"]  # same weights and pairs, a fuller queue
    state = task.state_dict()
    assert [len(part) for part in state["margins"]["queue"]] == [6, 6]
    third = gradients_of_step(engine, task)
    task.load_state_dict(state)
    assert gradients_of_step(engine, task)[0]["margin/mean"] == third[0]["margin/mean"]


def test_the_smaller_last_batch_of_an_epoch_is_trained_on(make_task, tiny_data):
    engine, task = make_task()
    steps = -(-len(tiny_data.train) // 10)
    assert len(tiny_data.train) % 10
    metrics, _, _ = gradients_of_step(engine, task, steps - 1)
    assert metrics["pairs"] == len(tiny_data.train) % 10


def test_margins_warm_up_from_a_share_to_the_whole(make_task):
    engine, task = make_task(margin=MarginConfig(kind="constant", parameters={"constant": 0.8}, warmup_share=0.2))
    means = [gradients_of_step(engine, task, step)[0]["margin/mean"] for step in (0, 1, 3, 7)]
    assert means == pytest.approx([0.2, 0.4, 0.8, 0.8])


def test_a_column_margin_is_the_gap_of_the_scores(make_task, tiny_data):
    _engine, task = make_task(margin=MarginConfig(kind="column", scale=2.0))
    batches = task.micro_batches(0)
    for batch in batches:
        task.loss(batch)
    seen = {int(p): float(m) for pairs, margins in task._seen for p, m in zip(pairs.positions, margins, strict=True)}
    for batch in batches:
        for position, gap in zip(batch.positions.tolist(), batch.margins.tolist(), strict=True):
            assert seen[position] == pytest.approx(2 * gap)


def test_held_out_rewards_are_those_of_the_rows_alone(make_task, tiny_data):
    engine, task = make_task()
    task.evaluate()
    evaluation = task.evaluation
    gaps = []
    for index in range(len(tiny_data.evals)):
        pair = tiny_data.evals.pair(index)
        rows = [torch.from_numpy(row.astype("int64"))[None] for row in (pair.chosen, pair.rejected)]
        with torch.no_grad():
            chosen, rejected = (engine.module.score(row, torch.ones_like(row).bool()) for row in rows)
        gaps.append(float(chosen - rejected))
    assert evaluation.accuracy.pairs == len(gaps)
    assert evaluation.mean_gap == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert evaluation.accuracy.value == pytest.approx(sum(gap > 0 for gap in gaps) / len(gaps))


def test_a_poisoned_row_is_named_and_the_step_skipped(make_task):
    engine, task = make_task(margin=MarginConfig(kind="ot"))
    with torch.no_grad():
        engine.module.hf.score.weight.fill_(float("inf"))
    batches = task.micro_batches(0)
    for place, batch in enumerate(batches):
        engine.backward(task.loss(batch), last=place == len(batches) - 1)
    info = engine.step()
    assert not info.applied
    assert task.row_ids(batches[0])[0].startswith("pairs.jsonl:")
    assert "margin/mean" not in task.step_metrics()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_held_out_rewards_that_are_not_finite_end_the_run_in_one_line_with_their_row(make_task, value):
    engine, task = make_task()
    with torch.no_grad():
        engine.module.hf.score.weight.fill_(value)
    with pytest.raises(TrainingStopped, match=r"not finite for \d+ of \d+ pairs, such as pairs\.jsonl:\d+"):
        task.evaluate()


@pytest.mark.parametrize("kind", ["bradley_terry", "grm_sft"])
@pytest.mark.parametrize("budget", [150, 100_000])
def test_a_prompt_that_is_computed_once_changes_neither_loss_nor_gradient(make_task, kind, budget):
    margin = GLOBAL_OT if LOSSES[kind].takes_margins else NO_MARGIN
    found = {}
    for packing in ("off", "auto"):
        engine, task = make_task(budget, loss=LossConfig(kind=kind), margin=margin, packing=packing)
        assert all((batch.buckets.packing is not None) == (packing == "auto") for batch in task.micro_batches(0))
        found[packing] = gradients_of_step(engine, task)
    (apart, own, _), (together, shared, _) = found["off"], found["auto"]
    assert together["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert (own - shared).abs().max() < 1e-5 * own.abs().max()
    assert together["tokens"] == apart["tokens"] and together["shared_share"] > 0.05, "the prompt is computed once"


@pytest.mark.parametrize("steps", [1, 150, 199, 5000])
def test_margins_of_a_hundred_steps_and_the_two_ends_are_written(steps, tmp_path):
    log = MarginLog(tmp_path, single_rank(), steps)
    written = [step for step in range(1, steps + 1) if log.wants(step)]
    assert len(written) <= STEPS + 2 and {1, steps} <= {*written}


@pytest.mark.parametrize("kind", ["none", "constant"])
def test_the_host_waits_twice_in_a_step_however_many_micro_batches_it_has(make_task, kind):
    """Once for the length of the gradient, and once for all metrics."""
    few, many = (waits_of_a_step(*make_task(budget, margin=MarginConfig(kind=kind))) for budget in (100_000, 150))
    assert len(few) == len(many) == 2, "\n".join(many)


@pytest.mark.full
@pytest.mark.parametrize("kind", sorted({*LOSSES} - {"norm_bt"}))  # which has a number from step to step
def test_a_loss_and_its_gradient_need_no_number_and_no_second_device(make_task, kind):
    losses = losses_without_numbers(*make_task(150, loss=LossConfig(kind=kind), margin=NO_MARGIN))
    assert len(losses) > 3 and all(loss.is_meta for loss in losses)


def test_margins_of_transport_are_made_on_the_host(make_task):
    """The device is waited for once for each set of pairs: so a number that is read by mistake would be found."""
    with pytest.raises(RuntimeError, match="copy out of meta"):
        losses_without_numbers(*make_task(150))


@pytest.mark.parametrize("parameters", [{"queue_pairs": 12}, {"scope": "global_batch"}])
@pytest.mark.parametrize("most", [10_000, 0])
def test_plans_of_few_pairs_are_made_on_the_host_and_are_the_same(make_task, monkeypatch, parameters, most):
    """As for pairs on a GPU, which are copied together first; larger plans are made where the pairs are."""

    def steps() -> list[dict[str, float]]:
        engine, task = make_task(150, margin=MarginConfig(kind="ot", parameters=parameters))
        rows = []
        for number in range(2):
            batches = task.micro_batches(number)
            for place, batch in enumerate(batches):
                engine.backward(task.loss(batch), last=place == len(batches) - 1)
            engine.step()
            rows.append(task.step_metrics())
        return rows

    expected, copies = steps(), []
    monkeypatch.setattr(margin_maker, "HOST_CELLS", most)
    monkeypatch.setattr(margin_maker, "_on_host", lambda values: copies.append(1) or margin_maker._copied(values))
    assert steps() == expected and bool(copies) == bool(most)


def test_a_queue_goes_on_where_the_next_pairs_are(make_task, monkeypatch):
    """From a checkpoint, or from plans that were made elsewhere: its type tells here that it was moved."""
    _, task = make_task(150, margin=MarginConfig(kind="ot", parameters={"queue_pairs": 30}))
    for batch in task.micro_batches(0):
        task.loss(batch)
    state, moves = task.state_dict()["margins"], []
    assert len(state["queue"][0]) > 3
    other = margin_maker.MarginMaker(MarginConfig(kind="ot", parameters={"queue_pairs": 30}), 20)
    other.load_state_dict(state, torch.device("cpu"))
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given: moves.append(given[0]) or move(self, *given))
    other._push(torch.ones(2, state["queue"][0].shape[1]), torch.ones(2))
    assert moves == [torch.device("cpu")] * 2 and len(other._queue[0]) == len(state["queue"][0]) + 2


def test_copies_on_the_host_have_the_type_and_shape_of_what_is_copied():
    values = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(4), "c": torch.randn(2, dtype=torch.float64)}
    for names in ("ab", "abc"):
        chosen = {name: values[name] for name in names}
        for name, copy in margin_maker._copied(chosen).items():
            assert torch.equal(copy, values[name]) and copy.dtype == values[name].dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_forward_or_backward_pass_of_a_step_waits_for_the_gpu(make_task):
    engine, task = make_task(150, margin=NO_MARGIN, ranks=single_rank())
    for number in range(3):  # the first builds kernels
        batches = task.micro_batches(number)
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            for place, batch in enumerate(batches):
                engine.backward(task.loss(batch), last=place == len(batches) - 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert engine.step().applied and task.step_metrics()["pairs"] == 10
