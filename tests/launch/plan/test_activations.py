"""What the formulas say that autograd saves, against what it does save."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from launch.plan.activations import (
    boundary_bytes,
    cache_bytes,
    head_bytes,
    layer_bytes,
    norm_bytes,
    working_bytes,
)
from launch.plan.shapes import shape_of
from policy.generation.cache import BLOCK, expand, new_cache
from rlhf.core.logprobs import token_logprobs
from rlhf.data.batching import Row, length_bucket, packed_buckets
from rlhf.models.hidden_states import last_states
from rlhf.models.packed_attention import set_packing

ROWS, WIDTH = 3, 40


def tiny(layers, attention="sdpa", dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype).train()


def saved_bytes(model):
    """Bytes of all storages that the backward pass of the backbone needs, but for the parameters."""
    tokens = torch.randint(50, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    return stored_bytes(model, lambda: model.base_model(input_ids=tokens, use_cache=False).last_hidden_state.sum())


def stored_bytes(model, compute):
    """The same of a computation with a model."""
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, or its address would be used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(size for size, _ in seen.values())


def of_a_layer(**options):
    """Bytes of one layer by difference: what is saved once for the whole model falls out."""
    build = options.pop("build", tiny)
    return saved_bytes(build(3, **options)) - saved_bytes(build(2, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_saves_what_the_formula_says(attention, dtype):
    found = of_a_layer(attention=attention, dtype=dtype)
    expected = layer_bytes(
        shape_of(tiny(1).config),
        ROWS * WIDTH,
        size=dtype.itemsize,
        attention=attention,
        squares=ROWS * WIDTH**2,
    )
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_layer_of_packed_rows_saves_what_the_formula_says(attention):
    """Two answers to a prompt, and a longer row, in two blocks."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(50, (2, 30), generator=generator)
    both[1, :20] = both[0, :20]
    alone = torch.randint(50, (1, 40), generator=generator)
    buckets = [length_bucket([Row(row.numpy(), row.numpy() >= 0) for row in rows]) for rows in (both, alone)]
    packing = packed_buckets(buckets).packing

    def build(layers):
        model = tiny(layers, attention)
        assert set_packing(model, "rows")
        return model

    def saved(layers):
        blocks = [bucket.tokens for bucket in buckets]
        return stored_bytes(model := build(layers), lambda: sum(s.sum() for s in last_states(model, blocks, packing)))

    expected = layer_bytes(
        shape_of(tiny(1).config),
        30 + 10 + 40,
        size=4,
        attention=attention,
        squares=2 * 30**2 + 40**2,
        attended=2 * 30 + 40,
    )
    assert expected == pytest.approx(saved(3) - saved(2), rel=0.03)


def test_fused_norms_and_mlps_keep_less_by_hand():
    """Of two norms and an MLP in half precision: 2 D in the place of 6 D bytes, each, and 6 F in the place of 8 F."""
    shape = shape_of(tiny(1).config)
    plain, fused = (layer_bytes(shape, 100, size=2, fused=fused) for fused in (False, True))
    assert plain - fused == 100 * (2 * 4 * shape.hidden + 2 * shape.intermediate)


def test_adapters_on_a_frozen_layer_save_what_the_formula_says():
    def build(layers):
        model = tiny(layers)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).base_model.model

    found = of_a_layer(build=build)
    expected = layer_bytes(shape_of(tiny(1).config), ROWS * WIDTH, size=4, trained="lora", lora_rank=4)
    assert expected == pytest.approx(found, rel=0.05)


def test_a_frozen_layer_below_saves_nothing():
    def build(layers):
        model = tiny(layers)
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        return model

    assert layer_bytes(shape_of(tiny(1).config), 100, size=4, trained="none") == 0
    assert of_a_layer(build=build) == 0


def test_checkpointing_saves_the_input_of_a_layer():
    def build(layers):
        model = tiny(layers)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    found = of_a_layer(build=build)
    inputs = boundary_bytes(shape_of(tiny(1).config), ROWS * WIDTH, size=4)
    assert found <= inputs < layer_bytes(shape_of(tiny(1).config), ROWS * WIDTH, size=4) / 10


def test_the_cache_has_the_size_of_its_buffers():
    model = tiny(2)
    shape = shape_of(model.config)
    rows, prompt, room = 5, 7, BLOCK
    cache = new_cache(model.config)
    with torch.no_grad():
        model.base_model(input_ids=torch.ones((1, prompt), dtype=torch.long), past_key_values=cache, use_cache=True)
        expand(cache, torch.zeros(rows, dtype=torch.long))
        model.base_model(input_ids=torch.ones((rows, 1), dtype=torch.long), past_key_values=cache, use_cache=True)
    buffers = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    held = sum(each.untyped_storage().nbytes() for each in buffers)
    planned = cache_bytes(shape, rows, prompt + room, size=4)
    assert held == planned * shape.layers / (shape.layers + 1)


@pytest.mark.parametrize("trained", [True, False])
def test_log_probabilities_never_take_more_than_planned(trained):
    """Measured by torch's own profile of allocations on the CPU, with a vocabulary that outweighs all else."""
    vocabulary, width, tokens = 20_000, 16, 128
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=trained)
    targets, mask = torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        token_logprobs(hidden, weight, targets, mask, chunk_tokens=32).logprobs.sum().backward()
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=8, num_attention_heads=2)
    planned = head_bytes(shape_of(config), tokens, size=4, chunk_tokens=32, backward=True, trained=trained)
    assert 0.6 * planned < peak <= 1.1 * planned


def test_norms_keep_less_without_a_gradient_for_their_weights():
    assert norm_bytes(10, size=4, trained=True) - norm_bytes(10, size=4, trained=False) == 40
    assert working_bytes(shape_of(tiny(1).config), 2, size=4) == 2 * 4 * (3 * 112 + 2 * 48)
