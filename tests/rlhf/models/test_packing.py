"""Packed rows give the states and gradients of ordinary ones, family by family."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlhf.core.packing import pack
from rlhf.models.backbones import switch_dropout_off
from rlhf.models.hidden_states import last_states
from rlhf.models.packed_attention import packs, set_packing

SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Mistral": GROUPED | {"sliding_window": 4},
    "Phi3": GROUPED | {"sliding_window": 6},
    "Gemma2": GROUPED
    | {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Gemma3Text": GROUPED | {"head_dim": 8, "sliding_window": 5},
    "GptOss": GROUPED | {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2": {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoX": SIZES,
    "OPT": {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "Granite": GROUPED,
}  # fmt: skip
PROMPT = np.arange(5, 14)


def texts(*lengths, seed=0):
    """Answers to one prompt, and rows that begin alike with none."""
    generator = np.random.default_rng(seed)
    alone = [generator.integers(20, 120, length) for length in (15, 6)]
    return [np.concatenate([PROMPT, generator.integers(20, 120, length)]) for length in lengths] + alone + [PROMPT[:5]]


def blocks_of(rows, groups):
    found = []
    for group in groups:
        lengths = np.array([len(rows[index]) for index in group])
        tokens = np.zeros((len(group), lengths.max()), np.int64)
        for place, index in enumerate(group):
            tokens[place, : lengths[place]] = rows[index]
        found.append((tokens, lengths))
    return found


def model_of(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    switch_dropout_off(model)
    return model.train()


def asked(model, rows, groups, *, packed):
    """States of each row, and gradients of a sum that weighs every number of them on its own."""
    blocks = blocks_of(rows, groups)
    assert set_packing(model, packed) is packed
    model.zero_grad()
    found = last_states(model, [torch.from_numpy(tokens) for tokens, _ in blocks], pack(blocks) if packed else None)
    states = {}
    for block, group in zip(found, groups, strict=True):
        states |= {index: block[place, : len(rows[index])] for place, index in enumerate(group)}
    total = 0.0
    for index, values in states.items():
        weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(index))
        total = total + (values * weights).sum()
    total.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {index: values.detach() for index, values in states.items()}, gradients


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 2e-5 * max(gradient.abs().max(), 1.0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_states_and_gradients_of_ordinary_ones(family):
    model, rows = model_of(family), texts(12, 7, 3)
    groups = [[0, 3], [1, 4, 5, 2]]
    packing = pack(blocks_of(rows, groups))
    assert len(packing.tokens) == sum(map(len, rows)) - 2 * len(PROMPT) - 5, "what rows begin alike with stands once"
    assert_equal(asked(model, rows, groups, packed=True), asked(model, rows, groups, packed=False))


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_with_recomputed_activations_too(family):
    model, rows, groups = model_of(family), texts(4, 9), [[1, 0], [2, 3, 4]]
    expected = asked(model, rows, groups, packed=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(asked(model, rows, groups, packed=True), expected)


def test_results_do_not_depend_on_how_rows_are_packed():
    model, rows = model_of("Qwen3"), texts(8, 2, 5)
    first = asked(model, rows, [[0, 3], [1, 2, 4, 5]], packed=True)
    assert_equal(asked(model, rows, [[5, 4, 3, 2, 1, 0]], packed=True), first)


def test_a_model_that_packs_takes_ordinary_rows_as_before():
    model, rows, groups = model_of("Llama"), texts(8, 2), [[0, 1, 2, 3, 4]]
    expected = asked(model, rows, groups, packed=False)
    tokens = torch.from_numpy(blocks_of(rows, groups)[0][0])
    assert set_packing(model, True)
    (states,) = last_states(model, [tokens])
    for index, values in expected[0].items():
        assert torch.equal(states[index, : len(values)].detach(), values)
    written = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert set_packing(model, False) is False and not packs(model)
    assert torch.equal(written, model.generate(tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=7), st.data())
def test_every_place_finds_its_token_and_the_past_of_it_once(rows, data):
    rows = [np.array(row) for row in rows]
    cut = data.draw(st.integers(1, len(rows)))
    groups = [group for group in (list(range(cut)), list(range(cut, len(rows)))) if group]
    blocks = blocks_of(rows, groups)
    packing = pack(blocks)
    pasts = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    assert len(packing.tokens) == len(pasts)
    for found, (tokens, lengths) in zip(packing.blocks(packing.spread(packing.tokens)), blocks, strict=True):
        for place, length in enumerate(lengths):
            assert found[place, :length].tolist() == tokens[place, :length].tolist()
    for found, (_, lengths) in zip(packing.blocks(packing.spread(packing.positions)), blocks, strict=True):
        for place, length in enumerate(lengths):
            assert found[place, :length].tolist() == list(range(length))


def test_gradients_of_spreading_and_collecting_are_those_of_plain_indices():
    rows, groups = texts(6, 2, 9), [[0, 3, 5], [1, 2, 4]]
    blocks = blocks_of(rows, groups)
    packing = pack(blocks)
    values = torch.randn(len(packing.tokens), 3, dtype=torch.float64, requires_grad=True)
    real = torch.cat([(torch.arange(t.shape[1])[None] < torch.from_numpy(n)[:, None]).flatten() for t, n in blocks])
    weights = torch.randn(len(real), 3, dtype=torch.float64) * real[:, None]
    (found,) = torch.autograd.grad((packing.spread(values) * weights).sum(), values)
    (expected,) = torch.autograd.grad((values[packing.slots] * weights).sum(), values)
    torch.testing.assert_close(found, expected)
    places = torch.randn(len(real), 3, dtype=torch.float64, requires_grad=True)
    again = torch.randn(len(packing.tokens), 3, dtype=torch.float64)
    (found,) = torch.autograd.grad((packing.collect(places) * again).sum(), places)
    (expected,) = torch.autograd.grad((places[packing.first] * again).sum(), places)
    torch.testing.assert_close(found, expected)
