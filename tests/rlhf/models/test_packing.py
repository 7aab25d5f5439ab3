"""Packed rows give the states and gradients of ordinary ones, family by family."""

import collections
import functools
import itertools

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as integration
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from rlhf.core.packing import pack, padded_length
from rlhf.models.backbones import switch_dropout_off
from rlhf.models.hidden_states import last_states
from rlhf.models.packed_attention import KERNELS, kernel_of, packed, set_packing

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
    "three heads": GROUPED | {"hidden_size": 24, "num_attention_heads": 6, "head_dim": 4},
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
    named = "Llama" if family == "three heads" else family
    config = getattr(transformers, f"{named}Config")(**FAMILIES[family])
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    switch_dropout_off(model)
    return model.train()


def asked(model, rows, groups, *, packed):
    """States of each row, and gradients of a sum that weighs every number of them on its own."""
    blocks = blocks_of(rows, groups)
    assert set_packing(model, packed or None) is bool(packed)
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
    assert_equal(asked(model, rows, groups, packed="rows"), asked(model, rows, groups, packed=None))


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_with_recomputed_activations_too(family):
    model, rows, groups = model_of(family), texts(4, 9), [[1, 0], [2, 3, 4]]
    expected = asked(model, rows, groups, packed=None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(asked(model, rows, groups, packed="rows"), expected)


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """PyTorch's own reference of FlexAttention, which it has for a CPU; it refuses gradients there without need."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(("before", "after"), [(8, KERNELS), (1000, 1000)])
def test_a_run_may_build_many_kernels_of_flex_attention(before, after):
    """At 8 Dynamo would let it run unfused: one model with frozen layers has as many."""
    with torch._dynamo.config.patch(recompile_limit=before):
        assert set_packing(model_of("Llama"), "flex") and torch._dynamo.config.recompile_limit == after > 50


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"GptOss"}))  # attention sinks: not on a CPU
def test_flex_attention_over_the_tree_has_the_states_and_gradients_of_ordinary_rows(family):
    model, rows = model_of(family), texts(12, 7, 3)
    expected = asked(model, rows, [[0, 3], [1, 4, 5, 2]], packed=None)
    assert_equal(asked(model, rows, [[0, 3], [1, 4, 5, 2]], packed="flex"), expected)
    assert_equal(asked(model, rows, [[5, 4, 3, 2, 1, 0]], packed="flex"), expected)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_with_recomputed_activations_too():
    model, rows, groups = model_of("Mistral"), texts(4, 9), [[1, 0], [2, 3, 4]]
    expected = asked(model, rows, groups, packed=None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(asked(model, rows, groups, packed="flex"), expected)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "three heads"])
def test_one_kernel_of_flex_attention_does_for_all_lengths(family, monkeypatch):
    """What is compiled, counted where it is not compiled to the end; one with and one without gradients."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention.flex_attention, backend=counted)
    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *given, training, **more: compiled(*given, **more)
    )
    torch._dynamo.reset()
    model, counts = model_of(family), []
    for lengths in ((9, 4), (300, 120, 31), (150, 90), (400, 290, 700)):
        rows = texts(*lengths)
        asked(model, rows, [list(range(len(rows)))], packed="flex")
        with torch.no_grad():
            blocks = blocks_of(rows, [list(range(len(rows)))])
            list(last_states(model, [torch.from_numpy(tokens) for tokens, _ in blocks], pack(blocks)))
        counts.append(counted.frame_count)
    assert counts == [2, 2, 2, 2]


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("lengths", [(12, 7, 3), (400, 290, 700)])
@pytest.mark.parametrize("window", [None, 4, 200])
def test_each_token_sees_the_past_of_its_own_row_within_the_window(window, lengths):
    rows, groups = texts(*lengths), [[0, 3], [1, 4, 5, 2]]
    packing = pack(blocks_of(rows, groups)).padded()
    plain = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    make = ALL_MASK_ATTENTION_FUNCTIONS["packed_flex_sdpa"]
    with packed(packing):
        (found,) = make(mask_function=plain, device=torch.device("cpu"), local_size=window).masks
    count = len(packing.tokens)
    places = torch.arange(count)
    sees = found.mask_mod(torch.zeros(()), torch.zeros(()), places[:, None], places[None])
    # By hand: where the tokens of each row stand in the sequence.
    expected = torch.zeros(count, count, dtype=torch.bool)
    order = [index for group in groups for index in group]
    slots = [block[place] for block in packing.blocks(packing.slots) for place in range(len(block))]
    for index, row in zip(order, slots, strict=True):
        for end, place in enumerate(row[: len(rows[index])].tolist()):
            start = 0 if window is None else max(0, end - window + 1)
            expected[place, row[start : end + 1]] = True
    real = len(packing.first)
    expected[range(real, count), range(real, count)] = True  # padding: each token sees itself
    assert torch.equal(sees, expected)
    wanted = flex_attention.create_block_mask(lambda b, h, q, k: expected[q, k], 1, None, count, count, device="cpu")
    blocks, exactly = found.to_dense(), wanted.to_dense()
    assert (blocks >= exactly).all(), "blocks that hold a pair are never left out"
    if window is None:
        assert torch.equal(blocks, exactly)
        assert torch.equal(found.full_kv_num_blocks, wanted.full_kv_num_blocks), "blocks seen as a whole"
        assert bool(wanted.full_kv_num_blocks.any()) == (max(lengths) > 300)
    else:
        assert blocks.sum() < 1.5 * exactly.sum() and not found.full_kv_num_blocks.any()


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_over_many_blocks_has_the_states_and_gradients_of_ordinary_rows():
    model = model_of("Llama")
    generator = np.random.default_rng(0)
    prompt = generator.integers(20, 120, 200)
    rows = [np.concatenate([prompt, generator.integers(20, 120, length)]) for length in (30, 290, 140)]
    rows = [row % 119 + 1 for row in [*rows, generator.integers(20, 120, 170)]]
    groups = [[0, 1], [3, 2]]
    assert_equal(asked(model, rows, groups, packed="flex"), asked(model, rows, groups, packed=None))


def test_kernels_are_built_for_few_lengths_that_are_hardly_longer():
    lengths = {count: padded_length(count) for count in range(2048, 16384)}
    assert all(count <= length for count, length in lengths.items())
    assert len({*lengths.values()}) <= 32 * 3 + 1
    assert sum(lengths.values()) / sum(lengths) < 1.02 and max(a / b - 1 for b, a in lengths.items()) < 1 / 32


@pytest.fixture
def flash(monkeypatch):
    """flash-attn's function for rows of different lengths, in a few lines; what it was called with."""
    calls = []

    def varlen(query, key, value, **options):
        calls.append(options)
        assert torch.equal(options["cu_seqlens_q"], options["cu_seqlens_k"])
        assert options["cu_seqlens_q"].dtype == torch.int32 and options["causal"]
        starts = options["cu_seqlens_q"].tolist()
        assert max(b - a for a, b in itertools.pairwise(starts)) == options["max_seqlen_q"] == options["max_seqlen_k"]
        repeats = query.shape[1] // key.shape[1]
        found = []
        for start, end in itertools.pairwise(starts):
            one, other, third = (part[start:end].transpose(0, 1) for part in (query, key, value))
            other, third = (part.repeat_interleave(repeats, dim=0) for part in (other, third))
            places = torch.arange(end - start)
            sees = places[:, None] >= places[None]
            if options.get("window_size") not in (None, (-1, -1)):
                sees &= places[:, None] - places[None] <= options["window_size"][0]
            scores = (one @ other.transpose(1, 2)) * options["softmax_scale"]
            found.append((scores.masked_fill(~sees, -torch.inf).softmax(-1) @ third).transpose(0, 1))
        return torch.cat(found)

    def functions(implementation, **_):
        assert implementation == "flash_attention_2"
        named = {"cache_seqlens": False, "block_table": False, "page_table": False}
        supported = collections.defaultdict(lambda: True, named)
        process = functools.partial(flash_utils._process_flash_attention_kwargs, supports_mapping=supported)
        return (None, varlen, None, None, None), (process, None)

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", functions)
    return calls


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_flash_attention_is_told_where_rows_begin_if_none_begins_like_another(family, flash):
    model = model_of(family)
    rows = [np.concatenate([[20 + index], row]) for index, row in enumerate(texts(12, 7, 3))]
    groups = [[0, 3], [1, 4, 5, 2]]
    expected = asked(model, rows, groups, packed=None)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert_equal(asked(model, rows, groups, packed="flex"), expected)
    padded = padded_length(sum(map(len, rows)))
    assert [call["cu_seqlens_q"][-1] for call in flash] == [padded] * model.config.num_hidden_layers
    starts = flash[0]["cu_seqlens_q"].diff().tolist()
    assert sorted(starts) == sorted([*map(len, rows), *[1] * (padded - sum(map(len, rows)))])
    assert ("window_size" in flash[0]) == (family == "Mistral")
    assert model.config._attn_implementation == "packed_flex_flash_attention_2"


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flash_attention_gives_way_to_flex_attention_where_rows_begin_alike(flash):
    model, rows, groups = model_of("Llama"), texts(12, 7, 3), [[0, 3], [1, 4, 5, 2]]
    expected = asked(model, rows, groups, packed=None)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert_equal(asked(model, rows, groups, packed="flex"), expected)
    assert not flash


def test_one_token_that_all_rows_begin_with_is_not_worth_a_tree():
    generator = np.random.default_rng(0)
    rows = [np.concatenate([[1], generator.integers(20, 120, length)]) for length in (90, 70, 80, 100)]
    packing = pack(blocks_of(rows, [[0, 1], [2, 3]]))
    assert len(packing.tokens) == sum(map(len, rows)) == sum(packing.lengths) and not len(packing.repeats)
    assert pack(blocks_of([row[:20] for row in rows], [[0, 1], [2, 3]])).lengths == ()


def test_results_do_not_depend_on_how_rows_are_packed():
    model, rows = model_of("Qwen3"), texts(8, 2, 5)
    first = asked(model, rows, [[0, 3], [1, 2, 4, 5]], packed="rows")
    assert_equal(asked(model, rows, [[5, 4, 3, 2, 1, 0]], packed="rows"), first)


def test_a_model_that_packs_takes_ordinary_rows_as_before():
    model, rows, groups = model_of("Llama"), texts(8, 2), [[0, 1, 2, 3, 4]]
    expected = asked(model, rows, groups, packed=None)
    tokens = torch.from_numpy(blocks_of(rows, groups)[0][0])
    assert set_packing(model, "rows")
    (states,) = last_states(model, [tokens])
    for index, values in expected[0].items():
        assert torch.equal(states[index, : len(values)].detach(), values)
    written = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert set_packing(model, None) is False and kernel_of(model) is None
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
    order = [index for group in groups for index in group]
    slots = [block[place] for block in packing.blocks(packing.slots) for place in range(len(block))]
    past = {int(place): tuple(rows[i][: end + 1]) for i, row in zip(order, slots, strict=True)
            for end, place in enumerate(row[: len(rows[i])])}  # fmt: skip
    for one, other in itertools.product(past, past):
        sees = other <= one < packing.ends[other]
        assert sees == (past[one][: len(past[other])] == past[other])
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
