"""Sampling from a model that ZeRO-3 has cut up, by a whole copy and forward by forward."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.generation import weights
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.generation.training import TrainingSampler
from policy.generation.weights import RolloutWeights
from rlhf.core.errors import ModelError
from rlhf.data.templates import chat_format
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.options import LoraOptions
from rlhf.models.tokenizer import load_tokenizer

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


@pytest.mark.slow
@pytest.mark.dist
def test_adapters_merged_for_a_rollout_draw_what_adapters_apart_draw_and_leave_every_bit(
    run_ranks, tiny_model, tmp_path
):
    """The worker compares all weights before and after each rollout."""
    drawn = {}
    for kind, ranks in (("local", 1), ("zero2", 2), ("zero3", 2)):
        run_ranks([WORKER, str(tiny_model), kind, str(tmp_path / kind), "4"], ranks=ranks)
        drawn[kind] = json.loads((tmp_path / kind).read_text())
    first, second = expected = drawn["local"]["never, 0"]
    assert drawn["zero2"] == drawn["zero3"] == dict.fromkeys(drawn["zero2"], expected)
    assert len(drawn["zero3"]) == 4 and first != second


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
    with found.fresh():
        assert found.model is engine and not found.synced
    assert capsys.readouterr().out == ""


def test_the_copy_takes_over_all_weights_at_first_and_then_those_that_matter(cut_up):
    """With adapters, the weights below them once more: the copy holds what came of merging."""
    engine, build = cut_up(lora=LoraOptions(rank=2, alpha=4.0, targets=["q_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter += 1.0
    found = RolloutWeights(engine, build, "once")
    asked = []
    engine.whole = lambda tensors: asked.extend(tensors) or torch.no_grad()
    parameters = dict(engine.module.named_parameters())
    needed = [value for name, value in parameters.items() if "lora_" in name or "base_layer" in name]
    for wanted in (list(parameters.values()), needed):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += 0.5 if parameter.requires_grad else 0.0
        asked.clear()
        with found.fresh():
            assert [id(parameter) for parameter in asked] == [id(parameter) for parameter in wanted]
        for name, mine in found.model.module.named_parameters():
            expected = parameters[name]
            if "base_layer" in name:
                down, up = (parameters[name.replace("base_layer.weight", f"lora_{end}.default.weight")] for end in "AB")
                expected = expected + 2.0 * up @ down
            torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("free_share", "merged"), [(2.1, True), (1.9, False)])
def test_adapters_are_merged_if_what_comes_of_it_takes_at_most_half_of_the_free_memory(
    tiny_policy, alone, monkeypatch, capsys, free_share, merged
):
    policy = tiny_policy(lora=LoraOptions(rank=2, alpha=4.0))
    engine = LocalEngine(policy, ranks=alone, optimizer=OptimizerConfig(), total_steps=1)
    below = [value for name, value in policy.named_parameters() if "base_layer" in name]
    size = sum(4 * weight.numel() for weight in below)
    monkeypatch.setattr(weights, "free_memory", lambda: int(free_share * size))
    found = RolloutWeights(engine, tiny_policy)
    assert ("adapters stay apart" in capsys.readouterr().out) != merged
    places = [weight.data_ptr() for weight in below]
    with found.fresh():
        assert all((weight.data_ptr() != place) == merged for weight, place in zip(below, places, strict=True))
    assert [weight.data_ptr() for weight in below] == places


def test_an_adapter_on_a_weight_that_others_use_stays_apart(tiny_policy, alone):
    """The embedding is the output projection as well: merged, it would change both."""
    policy = tiny_policy(lora=LoraOptions(rank=2, alpha=4.0, targets=["embed_tokens", "q_proj"]))
    assert policy.hf.get_output_embeddings().weight is policy.hf.get_input_embeddings().base_layer.weight
    table = policy.hf.get_output_embeddings().weight.data_ptr()
    found = RolloutWeights(LocalEngine(policy, ranks=alone, optimizer=OptimizerConfig(), total_steps=1), tiny_policy)
    query = policy.hf.model.layers[0].self_attn.q_proj.base_layer.weight
    place = query.data_ptr()
    with found.fresh():
        assert policy.hf.get_output_embeddings().weight.data_ptr() == table and query.data_ptr() != place


def test_a_rollout_that_fails_on_one_rank_alone_says_so_to_all(tiny_policy, tiny_model, alone, monkeypatch):
    """Models that are whole are asked rank by rank: the others wait for the responses of this one."""
    agreed = []
    monkeypatch.setattr(Ranks, "together", lambda self, action: agreed.append(action) or action())
    engine = LocalEngine(tiny_policy(), ranks=alone, optimizer=OptimizerConfig(), total_steps=1)
    chat = chat_format(load_tokenizer(tiny_model), "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    sampler = TrainingSampler(engine, chat, SamplingConfig(max_new_tokens=2), tiny_policy, "auto")
    with torch.no_grad():
        engine.module.hf.model.norm.weight[0] = torch.nan
    agreed.clear()
    with pytest.raises(ModelError, match="not finite"):
        sampler.generate([np.arange(3, 6)], [1])
    assert len(agreed) == 1


def test_ranks_that_share_a_model_count_broken_responses_together(tiny_policy, alone, monkeypatch):
    """One that has none raises with the others: it would wait for them."""
    monkeypatch.setattr(Ranks, "sum", lambda self, values: values + 2)
    monkeypatch.setattr(Ranks, "any", lambda self, flag: flag)
    sampler = HfSampler(
        LocalEngine(tiny_policy(), ranks=alone, optimizer=OptimizerConfig(), total_steps=1),
        SamplingConfig(max_new_tokens=2), eos_token_ids=(2,), pad_token_id=2, synced=True,
    )  # fmt: skip
    with pytest.raises(ModelError, match="2 responses were drawn"):
        sampler.generate([np.arange(3, 6)], [1])
