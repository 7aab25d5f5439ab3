"""Settings that cannot work are refused with the reason, before anything is loaded."""

import pytest

from policy.preference.config import PreferenceConfig
from rlhf.config import parse_command_line
from rlhf.core.errors import ConfigError

BASE = ["output=runs/x", "model.path=m", "data.train=pairs.jsonl"]
UNPAIRED = ["output=runs/x", "model.path=m", "unpaired.train=rows.jsonl"]


def parse(*overrides, base=BASE):
    return parse_command_line(PreferenceConfig, [*base, *overrides], program="preference", description="").config


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["loss.kind=dpo"], "no such objective; there are .*sigmoid"),
        (["loss.kind=sigmoid", "loss.parameters.margin=1"], "kind = sigmoid takes beta, smoothing; margin belongs to"),
        (["loss.kind=margin_sigmoid", "loss.parameters.delta=0.7"], r"log 2|log\(2\)|0\.69"),
        (["loss.kind=margin_sigmoid", "loss.parameters.smoothing=0.5"], "smoothing = 0.5: Input should be less than"),
        (
            ["loss.kind=margin_sigmoid", "loss.parameters.smoothing=0.1"],
            r"would not rest, but be pushed back. Set smoothing=0 or gate=true",
        ),
        (
            ["loss.kind=sigmoid", "loss.add=[{kind: margin_sigmoid, parameters: {smoothing: 0.2, delta: 0.4}}]"],
            "smoothing = 0.2 with delta = 0.4",
        ),
        (
            ["loss.kind=margin_sigmoid", "loss.parameters={smoothing: 0.1, gate: true}"],
            r"pairs stop where their loss is 0\.105, so that none comes to rest",
        ),
        (["loss.kind=cpo", "loss.tail_weight=0.5"], "would weight the likelihood term inside cpo"),
        (["loss.kind=sigmoid", "loss.tail_weight=0.5", "loss.add=[{kind: orpo}]"], "likelihood term inside orpo"),
        (["loss.kind=simpo", "reference.kind=cache"], "simpo has no reference"),
        (["loss.kind=simpo", "reference.cache=somewhere"], "simpo has no reference"),
        (["loss.kind=sigmoid", "reference.kind=none"], "compares with a reference"),
        (["loss.kind=apo_zero", "margin.kind=ot"], "no place for a margin"),
        (["loss.kind=apo_hinge_zero", "margin.kind=ot"], "has a margin of its own"),
        (["loss.kind=aot", "weights.kind=transport"], "weights.kind = transport weighs pairs"),
        (["loss.kind=madpo", "data.flip_labels=0.1"], "swap them in the file, or take soft ones"),
        (["loss.kind=madpo", "labels.kind=audited", "labels.use=swap"], "swap them in the file, or take soft ones"),
        (["loss.kind=madpo", "loss.parameters.largest=0.5"], "loss.parameters.largest = 0.5"),
        (["loss.kind=sigmoid", "reference.sync_every=10"], "a cache cannot move"),
        (["loss.kind=sigmoid", "loss.delta.schedule=warmup"], "sigmoid has no delta"),
        (["loss.kind=aot", "loss.wpo=true"], "wpo weights single pairs"),
        (["loss.kind=apo_zero", "loss.divergence=js"], "not defined for apo_zero"),
        (["loss.kind=kto"], "from the section unpaired"),
        (["loss.kind=sigmoid", "unpaired.train=rows.jsonl"], "from the section data"),
    ],
)
def test_refused(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(*overrides)


def test_kto_reads_unpaired_rows():
    assert parse("loss.kind=kto", base=UNPAIRED).rows.train == "rows.jsonl"


def test_a_sum_needs_a_reference_if_one_of_its_terms_does():
    config = parse("loss.kind=simpo", "loss.add=[{kind: sigmoid, weight: 0.5}]")
    assert config.loss.needs_reference
    assert [term.weight for term in config.loss.terms] == [1.0, 0.5]
