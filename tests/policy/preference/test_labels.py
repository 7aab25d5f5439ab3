"""Labels that an audit doubts, in the preference stage."""

import json

import numpy as np
import pytest
import torch

from policy.preference.config import LossConfig, PreferenceConfig, TermConfig
from policy.preference.losses import LOSSES
from reward.config import MarginConfig, WeightConfig
from rlhf.config import parse_command_line
from rlhf.core.errors import ConfigError
from rlhf.data.options import DataConfig, LabelsConfig
from rlhf.data.preferences import load_preferences
from rlhf.train.chat import load_chat

SOFT, SWAP, WEIGHT = (LabelsConfig(kind="audited", use=use) for use in ("soft", "swap", "weight"))
WITH_OPPOSITE = sorted(kind for kind, objective in LOSSES.items() if objective.has_opposite)
RPO = LossConfig(kind="sigmoid", nll_weight=0.3, add=(TermConfig(kind="sft"),), wpo=True, tail_weight=0.5)


@pytest.fixture
def load(tmp_path, tiny_model, tiny_pairs):
    """``load(wrong, labels)``: the tiny pairs with these probabilities."""

    def run(wrong, labels):
        rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
        path = tmp_path / "pairs.jsonl"
        marked = [row | {"audit_wrong": float(value)} for row, value in zip(rows, wrong, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in marked))
        data = DataConfig(train=str(path), eval_share=0.0, cache_dir=tmp_path / "cache")
        return load_preferences(data, load_chat(str(tiny_model), None), labels=labels)

    return run


def gradient_of_step(engine, task):
    for batch in task.micro_batches(0):
        task.loss(batch).backward()
    flat = torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])
    return task.step_metrics()["loss"], flat


SWAPPABLE = [LossConfig(kind=kind) for kind in WITH_OPPOSITE if kind not in ("ot_margin", "madpo")]


@pytest.mark.parametrize("loss", [*SWAPPABLE, RPO])
def test_labels_that_are_surely_wrong_are_swapped_ones(load, make_task, loss):
    surely = np.arange(90) % 3 == 0
    soft, swap = (
        gradient_of_step(*make_task(loss=loss, labels=labels, data=load(surely, labels))) for labels in (SOFT, SWAP)
    )
    assert soft[0] == pytest.approx(swap[0], rel=1e-4)
    assert (soft[1] - swap[1]).abs().max() < 1e-4 * swap[1].abs().max()


def test_the_opposite_label_turns_the_margin_of_the_data_round(make_task):
    _engine, task = make_task(99999, loss=LossConfig(kind="madpo"))
    [batch] = task.micro_batches(0)
    view = task._view(task._ask(batch)[0], batch)
    torch.testing.assert_close(view.opposite.columns["data_margins"], -view.columns["data_margins"])
    assert float(view.columns["data_margins"].abs().max()) > 0


GLOBAL_WEIGHTS = WeightConfig(kind="transport", parameters={"scope": "global_batch", "mass": 0.6})


@pytest.mark.parametrize("kind", ["sigmoid", "madpo", "simpo"])
def test_weights_by_partial_transport_do_not_depend_on_micro_batches(make_task, kind):
    loss = LossConfig(kind=kind)
    small, whole = (gradient_of_step(*make_task(size, loss=loss, weights=GLOBAL_WEIGHTS)) for size in (150, 99999))
    plain = gradient_of_step(*make_task(99999, loss=loss))
    assert small[0] == pytest.approx(whole[0], rel=1e-5)
    assert (small[1] - whole[1]).abs().max() < 1e-4 * whole[1].abs().max() < (plain[1] - whole[1]).abs().max()


def test_a_column_of_margins_enters_dpo_and_simpo_as_the_lead_that_is_asked_for(make_task):
    for kind in ("sigmoid", "simpo"):
        loss, margin = LossConfig(kind=kind), MarginConfig(kind="column", scale=2.0)
        _engine, task = make_task(99999, loss=loss, margin=margin)
        [batch] = task.micro_batches(0)
        found = float(task.loss(batch).detach())
        columns = {name: column.detach() for name, column in task._view(task._ask(batch)[0], batch).columns.items()}
        inputs = {name: columns[name] for name in LOSSES[kind].inputs}
        expected = LOSSES[kind](**inputs, margins=2.0 * batch.margins, **loss.values)
        assert found == pytest.approx(float(expected.mean()), rel=1e-5)
        assert abs(found - float(LOSSES[kind](**inputs, **loss.values).mean())) > 1e-3


@pytest.mark.parametrize("labels", [SOFT, WEIGHT], ids=["soft", "weight"])
@pytest.mark.parametrize("loss", [LossConfig(kind="sigmoid"), LossConfig(kind="ot_margin", scope="global_batch")])
def test_audited_labels_do_not_depend_on_micro_batches(load, make_task, labels, loss):
    data = load(np.random.default_rng(1).random(90), labels)
    small, whole = (gradient_of_step(*make_task(size, loss=loss, labels=labels, data=data)) for size in (150, 99999))
    given = gradient_of_step(*make_task(99999, loss=loss, data=data))
    assert small[0] == pytest.approx(whole[0], rel=1e-5)
    assert (small[1] - whole[1]).abs().max() < 1e-4 * whole[1].abs().max() < (given[1] - whole[1]).abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.train=d", "loss.kind=aot"), "loss.kind = aot has no opposite"),
        (("data.train=d", "loss.kind=sigmoid", "data.flip_labels=0.1"), "swaps labels after their audit"),
        (("unpaired.train=d", "loss.kind=kto"), "the section unpaired has none"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        base = ("output=o", "model.path=m", "labels.kind=audited")
        parse_command_line(PreferenceConfig, [*base, *settings], program="x", description="")
