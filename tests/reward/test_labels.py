"""Labels that an audit doubts: what they do to the data and to the loss, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.cli import main
from reward.audit.training import with_own_audit
from reward.config import LossConfig, MarginConfig, RewardConfig
from reward.tables import LOSSES
from rlhf.config import parse_command_line
from rlhf.core.errors import ConfigError, DataError
from rlhf.data.labels import pair_digest
from rlhf.data.options import ColumnConfig, DataConfig, LabelsConfig
from rlhf.data.preferences import load_preferences
from rlhf.data.records import to_records
from rlhf.engine.ranks import Ranks
from rlhf.models.options import BackboneConfig
from rlhf.train.chat import load_chat

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SOFT = LabelsConfig(kind="audited", use="soft")
SWAP, DROP, WEIGHT = (replace(SOFT, use=use) for use in ("swap", "drop", "weight"))
NO_MARGIN = MarginConfig(kind="none")
GLOBAL_OT = MarginConfig(kind="ot", parameters={"scope": "global_batch"})
WITH_OPPOSITE = sorted(kind for kind, loss in LOSSES.items() if loss.has_opposite)


@pytest.fixture(scope="module")
def audited_rows(tiny_pairs):
    """The tiny pairs with probabilities that their labels are wrong, as an audit leaves them."""
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    for row, wrong in zip(rows, np.random.default_rng(0).random(len(rows)).round(3).tolist(), strict=True):
        [record], _ = to_records(row, ColumnConfig(), row_id="", source="")
        row |= {"audit_wrong": wrong, "audit_pair": pair_digest(record)}
    return rows


@pytest.fixture
def load(tmp_path, tiny_model):
    """``load(rows, labels)`` with nothing held out."""

    def run(rows, labels, **options):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(train=str(path), eval_share=0.0, cache_dir=tmp_path / "cache", **options)
        return load_preferences(data, load_chat(str(tiny_model), None), labels=labels)

    return run


def gradient_of_step(engine, task):
    engine.module.zero_grad()
    for batch in task.micro_batches(0):
        task.loss(batch).backward()
    flat = torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])
    return task.step_metrics()["loss"], flat


def test_swap_and_drop_take_the_labels_that_are_more_likely_wrong_than_not(load, audited_rows):
    wrong = np.array([row["audit_wrong"] for row in audited_rows])
    given, swapped, dropped = (load(audited_rows, labels).train for labels in (LabelsConfig(), SWAP, DROP))
    np.testing.assert_array_equal(given.wrong, wrong)
    assert not given.flipped.any()
    np.testing.assert_array_equal(swapped.flipped, wrong > 0.5)
    assert [dropped.row_id(place) for place in range(len(dropped))] == [
        given.row_id(place) for place in np.flatnonzero(wrong <= 0.5)
    ]
    place = int(np.flatnonzero(wrong > 0.5)[0])
    np.testing.assert_array_equal(swapped.pair(place).chosen, given.pair(place).rejected)


def test_a_higher_threshold_swaps_fewer(load, audited_rows):
    swapped = load(audited_rows, replace(SWAP, above=0.9)).train.flipped
    assert 0 < swapped.sum() == sum(row["audit_wrong"] > 0.9 for row in audited_rows)


@pytest.mark.parametrize("kind", WITH_OPPOSITE)
def test_labels_that_are_surely_right_or_wrong_are_the_given_or_the_swapped_ones(load, audited_rows, make_task, kind):
    surely = [row | {"audit_wrong": float(number % 3 == 0)} for number, row in enumerate(audited_rows)]
    loss = LossConfig(kind=kind)
    soft, swap = (
        gradient_of_step(*make_task(loss=loss, margin=NO_MARGIN, labels=labels, data=load(surely, labels)))
        for labels in (SOFT, SWAP)
    )
    assert soft[0] == pytest.approx(swap[0], rel=1e-5)
    assert (soft[1] - swap[1]).abs().max() < 1e-5 * swap[1].abs().max()


def test_where_no_label_is_suspected_soft_labels_and_weights_change_nothing(load, audited_rows, make_task):
    right = load([row | {"audit_wrong": 0.0} for row in audited_rows], SOFT)
    given = gradient_of_step(*make_task(data=right))
    for labels in (SOFT, WEIGHT):
        torch.testing.assert_close(gradient_of_step(*make_task(labels=labels, data=right)), given, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bradley_terry", "generalized_cross_entropy", "robust"])
@pytest.mark.parametrize("margin", [GLOBAL_OT, MarginConfig(kind="column", scale=2.0)], ids=["ot", "column"])
def test_soft_labels_are_the_mean_over_both_labels_each_with_its_margin(load, audited_rows, make_task, kind, margin):
    data = load(audited_rows, SOFT)
    engine, task = make_task(100_000, loss=LossConfig(kind=kind), margin=margin, labels=SOFT, data=data)
    [batch] = task.micro_batches(0)
    found = float(task.loss(batch).detach())
    chosen, rejected = (side.double() for side in batch.sides(engine.forward(batch.buckets).rewards.detach()))
    margins, total = task._margins.of(batch.positions).double(), 0.0
    assert float(margins.abs().max()) > 0.1
    for place, index in enumerate(batch.indices.tolist()):
        one = slice(place, place + 1)
        wrong = audited_rows[index]["audit_wrong"]
        as_given = LOSSES[kind](chosen[one], rejected[one], margins[one])
        opposite = LOSSES[kind](rejected[one], chosen[one], margins[one])
        total += float((1 - wrong) * as_given + wrong * opposite) / len(batch)
    assert found == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("labels", [SOFT, WEIGHT], ids=["soft", "weight"])
def test_audited_labels_do_not_depend_on_micro_batches(load, audited_rows, make_task, labels):
    data = load(audited_rows, labels)
    small, whole = (
        gradient_of_step(*make_task(size, margin=GLOBAL_OT, labels=labels, data=data)) for size in (150, 99999)
    )
    given = gradient_of_step(*make_task(99999, margin=GLOBAL_OT, data=data))
    assert small[0] == pytest.approx(whole[0], rel=1e-5)
    assert (small[1] - whole[1]).abs().max() < 1e-5 * whole[1].abs().max() < (given[1] - whole[1]).abs().max()


def test_weights_are_one_in_the_mean_over_all_training_pairs(load, audited_rows, make_task):
    _engine, task = make_task(labels=WEIGHT, data=load(audited_rows, WEIGHT))
    weights = task._labels.losses(lambda opposite: torch.ones(90, dtype=torch.float64), torch.arange(90))
    wrong = torch.tensor([row["audit_wrong"] for row in audited_rows], dtype=torch.float64)
    torch.testing.assert_close(weights * (1 - wrong).mean(), 1 - wrong)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["audited", "made"])
def test_two_ranks_learn_from_soft_labels_what_one_learns(audited_rows, tiny_model, run_ranks, runs, tmp_path, kind):
    rows = audited_rows
    if kind == "made":
        swapped = lambda row: row | {"chosen": row["rejected"], "rejected": row["chosen"]}  # noqa: E731
        rows = [row if number % 8 else swapped(row) for number, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model.path={tiny_model}", f"data.train={tmp_path}/pairs.jsonl", "data.eval_share=0.2"]
    settings += ["margin.kind=ot", "margin.parameters.scope=global_batch"]
    settings += ["loss.kind=generalized_cross_entropy", f"labels.kind={kind}", "optim.learning_rate=3e-3"]
    settings += ["train.global_batch_size=10", "train.micro_batch_tokens=300", "train.max_steps=4"]
    settings += ["train.publish=none", "model.head_init_scale=10"]
    for ranks in (1, 2):
        folders = f"output={tmp_path}/{ranks}", f"data.cache_dir={tmp_path}/{ranks}-cache"  # each reads by itself
        said, *_ = run_ranks(["-m", "reward", *folders, *settings], ranks)
        assert kind == "audited" or ("of the labels look wrong" in said and "about 0%" not in said)
    rows = [runs.rows(Path(tmp_path / str(ranks))) for ranks in (1, 2)]
    assert len(rows[0]) >= 4
    runs.assert_close(*rows, 2e-4)


def changed(rows, number, **cells):
    return [row | cells if place == number else row for place, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"chosen": "another answer, happy"}, r"1 of 90 .* pairs\.jsonl:5, have changed since their audit"),
        ({"prompt": "another question"}, r"1 of 90 .* pairs\.jsonl:5, have changed since their audit"),
        ({"audit_wrong": None}, r"1 of 90 .* pairs\.jsonl:5, have no probability of a wrong label: `rlhf data audit`"),
    ],
)
def test_an_audit_of_data_that_changed_since_is_refused_where_it_is_read(load, audited_rows, cells, message):
    rows = changed(audited_rows, 4, **cells)
    with pytest.raises(DataError, match=message):
        load(rows, SOFT)
    assert len(load(rows, LabelsConfig()).train) == 90


def test_a_pair_whose_answers_were_swapped_since_is_refused(load, audited_rows):
    row = audited_rows[7]
    with pytest.raises(DataError, match="changed since their audit"):
        load(changed(audited_rows, 7, chosen=row["rejected"], rejected=row["chosen"]), SWAP)


@pytest.mark.parametrize("wrong", [1.2, -0.1, "maybe"])
def test_what_is_no_probability_is_a_bad_row(load, audited_rows, wrong):
    data = load(changed(audited_rows, 2, audit_wrong=wrong), LabelsConfig(), quarantine_max_share=0.1)
    assert len(data.train) == 89


def test_a_column_of_ones_own_needs_no_digest(load, audited_rows):
    rows = [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "doubt": 0.7}
        for row in audited_rows
    ]
    assert load(rows, SWAP, columns=ColumnConfig(wrong="doubt")).train.flipped.all()


def test_dropping_all_pairs_is_refused(load, audited_rows):
    with pytest.raises(DataError, match="leaves no training pairs"):
        load([row | {"audit_wrong": 0.9} for row in audited_rows], DROP)
    surely_wrong = [row | {"audit_wrong": 1.0} for row in audited_rows]
    with pytest.raises(DataError, match=r"labels\.use = weight leaves no training pairs"):
        load(surely_wrong, WEIGHT)
    assert load(surely_wrong, SWAP).train.flipped.all()


def test_an_audit_of_the_runs_own_is_that_of_the_command(load, audited_rows, make_task, tiny_model, tmp_path, capsys):
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in audited_rows]
    for row in rows[::8]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    labels, model = LabelsConfig(kind="made"), BackboneConfig(path=str(tiny_model))
    given, chat = load(rows, labels), load_chat(str(tiny_model), None)
    assert np.isnan(given.train.wrong).all()
    made = with_own_audit(given, labels, model, chat, ALONE, cache=tmp_path)
    assert "labels: answer 180/180  ETA 0:00:00" in capsys.readouterr().out
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "audit", str(tmp_path / "pairs.jsonl"), "--model", str(tiny_model), "-o", str(tmp_path / "a")]
    assert main([*command, "--cache-dir", str(tmp_path)]) == 0
    said = [json.loads(line)["audit_wrong"] for line in (tmp_path / "a" / "pairs.jsonl").read_text().splitlines()]
    assert np.corrcoef(made.train.wrong, said)[0, 1] > 0.9 and max(said) > 0.5
    planted = np.arange(90) % 8 == 0
    assert made.train.wrong[planted].mean() > 3 * made.train.wrong[~planted].mean()
    swapped = with_own_audit(given, replace(labels, use="swap"), model, chat, ALONE, cache=tmp_path).train
    np.testing.assert_array_equal(swapped.flipped, made.train.wrong > 0.5)
    believed, doubted = (
        gradient_of_step(*make_task(99999, labels=each, data=made))[0] for each in (LabelsConfig(), labels)
    )
    assert believed != pytest.approx(doubted, rel=1e-3)


def test_too_few_pairs_for_an_audit_of_the_runs_own_are_refused(load, audited_rows, tiny_model, tmp_path):
    labels, model = LabelsConfig(kind="made"), BackboneConfig(path=str(tiny_model))
    data, chat = load(audited_rows[:3], labels), load_chat(str(tiny_model), None)
    with pytest.raises(DataError, match="3 different pairs make no 5 folds"):
        with_own_audit(data, labels, model, chat, ALONE, cache=tmp_path)


BASE = ("output=o", "model.path=m", "data.train=d", "labels.kind=audited")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.flip_labels=0.2",), "swaps labels after their audit"),
        (("loss.kind=grm_sft", "margin.kind=none"), "loss.kind = grm_sft has no opposite"),
        (("loss.kind=pos_reg",), "loss.kind = pos_reg has no opposite"),
        (("labels.use=guess",), "labels.use = .guess"),
        (("labels.above=1",), "labels.above = 1"),
        (("labels.layer=3",), "layer = 3 is for kind = made"),
        (("labels.kind=made", "data.flip_labels=0.1"), "labels.kind = made, but data.flip_labels"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_command_line(RewardConfig, [*BASE, *settings], program="x", description="")
