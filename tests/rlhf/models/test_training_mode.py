"""Engines train in training mode, where Transformers checkpoints; a model's own dropout is off unless asked for."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rlhf.core.errors import ModelError
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import single_rank
from rlhf.models.backbones import load_causal_lm, switch_dropout_off
from rlhf.models.kernels import checkpoint_activations
from rlhf.models.options import BackboneConfig
from rlhf.models.trainable import decoder_layers, freeze_lower_layers

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(params=["gpt2", "opt"])
def noisy(request, tmp_path) -> Path:
    """A model with much dropout, in modules (GPT-2) and in attributes of layers (OPT)."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        rates = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, **rates))
    else:
        sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        rates = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
        model = OPTForCausalLM(OPTConfig(vocab_size=20, word_embed_proj_dim=16, **sizes, **rates))
    model.save_pretrained(tmp_path)
    return tmp_path


def engine(folder: Path, **options) -> LocalEngine:
    model = load_causal_lm(BackboneConfig(path=str(folder), **options), dtype=torch.float32, vocabulary=20)
    freeze_lower_layers(model, options.get("freeze_layers", 0))
    if options.get("gradient_checkpointing"):
        checkpoint_activations(model)
    return LocalEngine(model, ranks=single_rank(), optimizer=OptimizerConfig(learning_rate=1e-3), total_steps=1)


def test_the_models_own_dropout_acts_only_if_asked_for(noisy):
    quiet, loud = engine(noisy), engine(noisy, dropout=True)
    first, second = (quiet.forward(input_ids=TOKENS).logits for _ in range(2))
    assert torch.equal(first, second)
    assert quiet.module.config.to_dict() == loud.module.config.to_dict()
    first, second = (loud.forward(input_ids=TOKENS).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_layers_are_computed_again_in_the_backward_pass(tiny_model):
    found = engine(tiny_model, gradient_checkpointing=True)
    calls = []
    decoder_layers(found.module)[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    loss = found.forward(input_ids=TOKENS).logits.sum()
    assert len(calls) == 1
    found.backward(loss, last=True)
    assert len(calls) == 2


def test_checkpointing_leaves_frozen_layers_out_of_the_backward_pass(tiny_model):
    found = engine(tiny_model, gradient_checkpointing=True, freeze_layers=2)
    calls = []
    for number, layer in enumerate(decoder_layers(found.module)):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    found.backward(found.forward(input_ids=TOKENS).logits.sum(), last=True)
    assert calls == [0, 1, 2, 2]


def test_noise_of_a_router_is_switched_off_too():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=20, num_key_value_heads=1, num_local_experts=4, router_jitter_noise=0.5, **sizes)
    model = MixtralForCausalLM(config).train()
    assert not torch.equal(model(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    switch_dropout_off(model)
    assert torch.equal(model(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_a_router_that_is_random_at_any_rate_is_refused():
    with pytest.raises(ModelError, match=r"Phi-MoE draws experts at random.*model.dropout=true"):
        switch_dropout_off(SimpleNamespace(config=SimpleNamespace(model_type="phimoe")))
