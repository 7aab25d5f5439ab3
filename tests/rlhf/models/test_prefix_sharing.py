"""Which families give tokens the same states in packed rows, and that training on them is the same."""

import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.core.packing import pack
from rlhf.models.backbones import checkpoint_activations
from rlhf.models.hidden_states import last_states
from rlhf.models.prefix_sharing import longest_packed_row

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 300,
}
OTHER_SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 300},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 16},
    "qwen3": {**SMALL, "head_dim": 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 4},
}
EXACT = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "gemma2", "olmo2"]
INEXACT = ["bloom", "mamba"]
"""Families without positions of their own, or without attention."""


def tiny(family, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**OTHER_SIZES.get(family, SMALL), **settings, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def items():
    random = np.random.default_rng(0)
    found = []
    for common, first, second in ((5, 3, 6), (2, 7, 1), (9, 1, 1)):
        start = random.integers(3, 300, common)
        found.append([np.concatenate([start, random.integers(3, 300, own)]) for own in (first, second)])
    return found


def states_and_gradients(model, packed):
    """Of all real tokens of the rows: packed, or each row by itself."""
    rows = [row for item in items() for row in item]
    model.zero_grad()
    if packed:
        (block,) = last_states(model, [pack(items())])
        states = [states[: len(row)] for states, row in zip(block, rows, strict=True)]
    else:
        states = [next(last_states(model, [torch.from_numpy(row)[None]]))[0] for row in rows]
    weights = torch.linspace(-1, 1, states[0].shape[-1])
    sum((each * weights).square().sum() for each in states).backward()
    return states, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EXACT)
def test_states_and_gradients_are_those_of_rows_alone(family, attention):
    model = tiny(family)
    model.set_attn_implementation(attention)
    assert longest_packed_row(model) > 0
    (states, gradients), (alone, expected) = (states_and_gradients(model, packed) for packed in (True, False))
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", INEXACT)
def test_a_family_that_gives_other_states_is_found_out(family):
    assert longest_packed_row(tiny(family)) == 0


def test_a_sliding_window_bounds_packed_rows():
    assert longest_packed_row(tiny("gemma2")) == 16
    assert longest_packed_row(tiny("llama")) == sys.maxsize


def test_kernels_that_take_no_mask_are_not_asked():
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert longest_packed_row(model) == 0


def test_checkpointed_activations_give_the_same_gradients():
    plain = states_and_gradients(tiny("llama"), packed=True)[1]
    model = tiny("llama").train()
    checkpoint_activations(model)
    torch.testing.assert_close(states_and_gradients(model, packed=True)[1], plain, rtol=1e-4, atol=1e-5)
