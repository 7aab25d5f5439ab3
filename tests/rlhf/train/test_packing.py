"""Which models take packed sequences is found out on a few rows."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from policy.model import PolicyModel
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import switch_dropout_off
from rlhf.models.packed_attention import packs
from rlhf.train.packing import allow_packing

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def policy_of(family, attention=None, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    switch_dropout_off(hf)
    return PolicyModel(hf)


def allowed(policy):
    found = allow_packing(ReplicatedModel(policy, ALONE))
    assert packs(policy.hf) is found
    return found


def test_a_llama_packs_and_nothing_is_said(capsys):
    assert allowed(policy_of("Llama", intermediate_size=48))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("family", "settings"), [("Bloom", {}), ("Mamba", {"state_size": 4}), ("Falcon", {"alibi": True})]
)
def test_a_family_with_attention_of_its_own_keeps_its_length_buckets(family, settings, capsys):
    assert not allowed(policy_of(family, **settings))
    assert "length buckets, not packed rows" in capsys.readouterr().out


def test_a_model_that_looks_at_neighbors_in_the_sequence_keeps_its_length_buckets(capsys):
    policy = policy_of("Llama", intermediate_size=48)
    layer = policy.hf.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.roll(1, dims=1))
    assert not allowed(policy)
    assert "says something else of them" in capsys.readouterr().out


def test_dropout_is_not_shared_between_answers(capsys):
    policy = policy_of("Llama", intermediate_size=48)
    policy.hf.model.layers[0].mlp.act_fn = nn.Sequential(policy.hf.model.layers[0].mlp.act_fn, nn.Dropout(0.1))
    assert not allowed(policy)
    assert "dropout" in capsys.readouterr().out


def test_a_rank_that_differs_decides_for_all(monkeypatch, capsys):
    monkeypatch.setattr(Ranks, "any", lambda self, flag: True)
    assert not allowed(policy_of("Llama", intermediate_size=48))
    assert "another rank differs" in capsys.readouterr().out
