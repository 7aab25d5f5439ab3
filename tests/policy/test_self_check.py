"""Models of many families, asked in the toolkit's ways and in their own."""

from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from policy.building import build_policy
from policy.generation.check import check_sampling
from policy.model import PolicyModel
from policy.options import PolicyConfig
from policy.self_check import check_logprobs
from rlhf.core.errors import ModelError
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.ranks import Ranks, single_rank

SMALL = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 7.0},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "phi3": {},
    # heads that were guessed wrong before: a scale that multiplies, a multiplier of another name, a bound
    "hyperclovax": {"logits_scaling": 7.0},
    "falcon_h1": {"lm_head_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "head_dim": 8},
    # code that asks whether the name of the attention is "sdpa"
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    # state-space models: a cache of another name, which has no places
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
}  # fmt: skip


def make(family, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.6)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_that_is_going_to_run_on_flash_attention_is_checked_on_the_cpu(family):
    model = make(family)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises((ImportError, TypeError)):  # as it is, a CPU cannot run it
        model(input_ids=torch.arange(3, 9)[None])
    check_logprobs(PolicyModel(model), family)
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_can_be_trained_and_sampled(family):
    model = PolicyModel(make(family))
    check_logprobs(model, family)
    check_sampling(ReplicatedModel(model, single_rank()), family)


@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_attention_scores_are_bounded_as_the_family_does(family, tmp_path):
    """SDPA leaves the bound out, and is what Transformers takes by itself."""
    config = AutoConfig.for_model(family, **SMALL, head_dim=8, attn_logit_softcapping=1.0)
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    tokens = torch.arange(5, 30)[None]
    logits = {
        kind: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=kind).eval()(input_ids=tokens).logits
        for kind in ("eager", "sdpa")
    }
    assert (logits["eager"] - logits["sdpa"]).abs().max() > 0.1
    policy = build_policy(PolicyConfig(path=str(tmp_path)), dtype=torch.float32, vocabulary=0, seed=0)
    torch.testing.assert_close(policy.plain().eval()(input_ids=tokens).logits, logits["eager"])
    with pytest.raises(ModelError, match=f"sdpa leaves out the soft-capping of attention that {family} has"):
        build_policy(PolicyConfig(path=str(tmp_path), attention="sdpa"), dtype=torch.float32, vocabulary=0, seed=0)


def test_a_family_whose_configuration_knows_no_padding_token_is_checked():
    config = AutoConfig.for_model(
        "codegen", vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
    )
    assert not hasattr(config, "pad_token_id")
    model = PolicyModel(AutoModelForCausalLM.from_config(config).eval())
    check_logprobs(model, "codegen")
    check_sampling(ReplicatedModel(model, single_rank()), "codegen")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
def test_rounding_in_low_precision_is_no_fault(family, dtype):
    model = PolicyModel(make(family).to(dtype))
    check_logprobs(model, family)
    check_sampling(ReplicatedModel(model, single_rank()), family)


class Scaled(LlamaForCausalLM):
    """Multiplies its logits, which no setting tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.3
        return output


class Normed(LlamaForCausalLM):
    """Puts a norm between its last layer and its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = nn.functional.layer_norm(output.logits, output.logits.shape[-1:])
        return output


class Shortsighted(LlamaForCausalLM):
    """Has no use for tokens of any other place than the first one of a call."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(self._forget, with_kwargs=True)

    @staticmethod
    def _forget(module, args, kwargs):
        if kwargs.get("past_key_values") is not None and kwargs["input_ids"].shape[1] == 1:
            kwargs["position_ids"] = kwargs["position_ids"] + 7
        return args, kwargs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Scaled, Normed])
def test_a_model_that_does_something_unknown_to_its_logits_is_refused_with_numbers(kind, dtype):
    hf = make("llama", initializer_range=0.3)
    hf.__class__ = kind
    with pytest.raises(ModelError, match=rf"here \({kind.__name__}\): .* up to [\d.]+ nats off .* at most [\d.]+\)"):
        check_logprobs(PolicyModel(hf.to(dtype)), "here")
    assert type(hf.get_output_embeddings()).__name__ == "LogprobHead"


def test_a_model_that_counts_places_in_its_own_way_while_decoding_is_refused():
    made = make("llama")
    hf = Shortsighted(made.config).eval()
    hf.load_state_dict(made.state_dict())
    model = PolicyModel(hf)
    check_logprobs(model, "here")
    with pytest.raises(ModelError, match=r"sampled one by one have log-probabilities up to [\d.]+ nats off"):
        check_sampling(ReplicatedModel(model, single_rank()), "here")


def test_a_model_that_sees_the_padding_behind_a_row_is_refused():
    hf = make("llama")
    hf.model.register_forward_hook(_mix_all_places)
    with pytest.raises(ModelError, match="nats off"):
        check_logprobs(PolicyModel(hf), "here")


def _mix_all_places(module, args, output):
    output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(dim=1, keepdim=True)
    return output


def test_building_a_policy_checks_it(tiny_model, monkeypatch):
    monkeypatch.setattr("rlhf.models.backbones.logit_options", lambda settings: {"logit_scale": 0.5, "softcap": None})
    with pytest.raises(ModelError, match=f"model.path = {tiny_model}.*nats off"):
        build_policy(PolicyConfig(path=str(tiny_model)), dtype=torch.float32, vocabulary=10, seed=0)


def test_a_check_leaves_mode_weights_and_random_numbers_alone(tiny_model):
    policy = build_policy(PolicyConfig(path=str(tiny_model)), dtype=torch.float32, vocabulary=10, seed=0)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check_logprobs(policy, "here")
    check_sampling(ReplicatedModel(policy, single_rank()), "here")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_fault_of_another_rank_is_everybodys():
    model = PolicyModel(make("llama"))
    here = ReplicatedModel(model, single_rank())
    agreed = []

    class Watched(Ranks):
        def together(self, action):
            agreed.append(True)
            return super().together(action)

    ranks = single_rank()
    here.ranks = Watched(**{field.name: getattr(ranks, field.name) for field in fields(ranks)})
    check_sampling(here, "here")
    assert agreed


def test_a_policy_that_is_not_the_trained_one_is_named_by_its_setting(tiny_model, monkeypatch):
    monkeypatch.setattr("rlhf.models.backbones.logit_options", lambda settings: {"logit_scale": 0.5, "softcap": None})
    config = PolicyConfig(path=str(tiny_model))
    build_policy(config, dtype=torch.float32, vocabulary=10, seed=0, checked=False)
    with pytest.raises(ModelError, match=f"reference.path = {tiny_model}.*nats off"):
        build_policy(config, dtype=torch.float32, vocabulary=10, seed=0, setting="reference.path")
