"""Sampling from a model that ZeRO-3 has cut up, by a whole copy and forward by forward."""

import json
from pathlib import Path

import pytest
import torch

from policy.generation import weights
from policy.generation.weights import RolloutWeights
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.models.options import LoraOptions

WORKER = str(Path(__file__).parent / "workers" / "sample.py")


@pytest.mark.slow
@pytest.mark.dist
def test_two_unequal_ranks_under_zero3_draw_what_one_rank_draws(run_ranks, tiny_model, tmp_path):
    (_,) = run_ranks([WORKER, str(tiny_model), "local", str(tmp_path / "one.json")], ranks=1)
    said, _ = run_ranks([WORKER, str(tiny_model), "zero3", str(tmp_path / "two.json")], ranks=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    first, second = expected = one["never, 0"]
    assert two == {f"{choice}, {places}": expected for choice in ("once", "never") for places in (0, 1)}
    assert len({len(tokens) for tokens in first}) > 2, "rows must end at different places"
    assert first != second
    assert "rollouts: ZeRO-3 weights gathered once per rollout (0.0 GiB per rank)" in said
    assert said.count("rollouts: ZeRO-3 weights gathered for every token\n") == 1


@pytest.fixture
def cut_up(tiny_policy, alone):
    """``cut_up(**model options)``: an engine that looks as if ZeRO-3 had cut up its parameters, and a builder."""

    def make(**options):
        engine = LocalEngine(tiny_policy(**options), ranks=alone, optimizer=OptimizerConfig(), total_steps=1)
        for place, parameter in enumerate(engine.module.parameters()):
            parameter.ds_id, parameter.ds_numel = place, parameter.numel()
        return engine, lambda: tiny_policy(**options)

    return make


@pytest.mark.parametrize(("free_share", "copied"), [(2.1, True), (1.9, False)])
def test_a_copy_is_held_if_it_takes_at_most_half_of_the_free_memory(cut_up, monkeypatch, capsys, free_share, copied):
    engine, build = cut_up()
    size = sum(4 * parameter.numel() for parameter in engine.module.parameters())
    monkeypatch.setattr(weights, "free_memory", lambda: int(free_share * size))
    found = RolloutWeights(engine, build, "auto")
    assert (found.model is not engine) == copied and found.synced != copied
    assert ("once per rollout" in capsys.readouterr().out) == copied


def test_choices_are_obeyed_whatever_the_memory(cut_up, monkeypatch):
    engine, build = cut_up()
    monkeypatch.setattr(weights, "free_memory", lambda: 0)
    assert RolloutWeights(engine, build, "once").model is not engine
    monkeypatch.setattr(weights, "free_memory", lambda: None)
    assert RolloutWeights(engine, build, "never").model is engine


def test_whole_models_are_sampled_from_as_they_are(tiny_policy, alone, capsys):
    engine = LocalEngine(tiny_policy(), ranks=alone, optimizer=OptimizerConfig(), total_steps=1)
    found = RolloutWeights(engine, tiny_policy, "once")
    found.refresh()
    assert found.model is engine and not found.synced
    assert capsys.readouterr().out == ""


def test_the_copy_takes_over_all_weights_at_first_and_then_the_trained_ones(cut_up):
    engine, build = cut_up(lora=LoraOptions(rank=2, alpha=4.0))
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter += 1.0
    found = RolloutWeights(engine, build, "once")
    asked = []
    engine.whole = lambda tensors: asked.extend(tensors) or torch.no_grad()
    for wanted in (list(engine.module.parameters()), [p for p in engine.module.parameters() if p.requires_grad]):
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter += 0.5 if parameter.requires_grad else 0.0
        asked.clear()
        found.refresh()
        assert [id(parameter) for parameter in asked] == [id(parameter) for parameter in wanted]
        for mine, theirs in zip(found.model.module.parameters(), engine.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)
