"""Which models take packed sequences is found out on a few rows."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from policy.model import PolicyModel
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import switch_dropout_off
from rlhf.models.kernels import checkpoint_activations
from rlhf.models.packed_attention import kernel_of
from rlhf.train import packing
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


def allowed(policy, *, trained=True):
    placed = ReplicatedModel(policy, ALONE)
    policy.requires_grad_(trained)
    found = allow_packing(placed)
    assert kernel_of(policy.hf) == ("rows" if found else None)
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


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What a GPU would be offered, with PyTorch's own reference of FlexAttention."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    kernels_of = packing.kernels_for
    monkeypatch.setattr(packing, "kernels_for", lambda hf, device: kernels_of(hf, torch.device("cuda")))
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("family", "attention", "settings"),
    [
        ("Llama", None, {}),
        ("Qwen3", None, {"head_dim": 8, "num_key_value_heads": 2}),
        ("Gemma2", "eager", {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 5}),
    ],
)
def test_on_a_gpu_packed_rows_attend_by_flex_attention(family, attention, settings, capsys):
    policy = policy_of(family, attention, intermediate_size=48, **settings)
    assert allow_packing(ReplicatedModel(policy, ALONE))
    assert kernel_of(policy.hf) == "flex" and capsys.readouterr().out == ""


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_where_flex_attention_does_not_run_rows_attend_one_by_one(capsys):
    sinks = {"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    assert allowed(policy_of("GptOss", "eager", intermediate_size=48, **sinks))
    assert "packed rows attend one by one, not by FlexAttention: ValueError: Attention sinks" in capsys.readouterr().out


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_kernel_that_fails_when_it_is_computed_again_is_found_out_at_the_start(capsys):
    """As PyTorch's reference does with soft-capping."""
    policy = policy_of("Gemma2", "eager", intermediate_size=48, head_dim=8, num_key_value_heads=2)
    checkpoint_activations(policy.hf)
    assert allowed(policy)
    assert "not by FlexAttention: RuntimeError" in capsys.readouterr().out


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_where_gradients_of_flex_attention_are_wrong_rows_attend_one_by_one(monkeypatch, capsys):
    right = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def wrong(module, query, key, value, *rest, **options):
        return right(module, query.detach() + 0.9 * (query - query.detach()), key, value, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", wrong)
    assert allowed(policy_of("Llama", intermediate_size=48))
    assert "not by FlexAttention: its attention or its gradients are others, by 0.1 of" in capsys.readouterr().out
    frozen = policy_of("Llama", intermediate_size=48)
    assert allow_packing(ReplicatedModel(frozen, ALONE)) and kernel_of(frozen.hf) == "flex"  # it needs no gradients


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("trained", [True, False])
def test_where_flex_attention_says_something_else_rows_attend_one_by_one(trained, monkeypatch, capsys):
    right = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def wrong(*given, **options):
        values, weights = right(*given, **options)
        return values * 1.1, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", wrong)
    assert allowed(policy_of("Llama", intermediate_size=48), trained=trained)
    said = "or its gradients are others" if trained else "is another"
    assert f"not by FlexAttention: its attention {said}, by 0.1 of" in capsys.readouterr().out


def test_dropout_is_not_shared_between_answers(capsys):
    policy = policy_of("Llama", intermediate_size=48)
    policy.hf.model.layers[0].mlp.act_fn = nn.Sequential(policy.hf.model.layers[0].mlp.act_fn, nn.Dropout(0.1))
    assert not allowed(policy)
    assert "dropout" in capsys.readouterr().out


def test_a_rank_that_differs_decides_for_all(monkeypatch, capsys):
    monkeypatch.setattr(Ranks, "any", lambda self, flag: True)
    assert not allowed(policy_of("Llama", intermediate_size=48))
    assert "another rank differs" in capsys.readouterr().out
