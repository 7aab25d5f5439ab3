"""The sampler against transformers.generate, against exact distributions, and against itself in other company."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from policy.generation.api import row_seed, row_uniforms
from policy.generation.cache import BLOCK
from policy.model import PolicyModel
from rlhf.core.errors import ConfigError, ModelError
from rlhf.data.batching import Row, length_bucket

GREEDY = {"top_k": 1}
VOCABULARY = 321  # of the tiny model
SIZES = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "as many key heads as query heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4})),
    "eager attention": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "mixed layers, capped logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=5, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
}


def generated(hf, prompts, count, eos) -> list[list[int]]:
    """What transformers.generate writes greedily, one prompt at a time, without padding after the end."""
    found = []
    for prompt in prompts:
        tokens = torch.from_numpy(prompt)[None]
        with torch.no_grad():
            out = hf.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=eos or None,
                pad_token_id=2,
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def written(responses) -> list[list[int]]:
    return [response.tokens.tolist() for response in responses]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate_token_by_token(make_sampler, prompts, seeds, name):
    torch.manual_seed(3)
    hf = MODELS[name]().eval()
    free = generated(hf, prompts, 20, ())
    eos = sorted({row[5 + 2 * place] for place, row in enumerate(free[:4])})  # rows end at different places
    expected = generated(hf, prompts, 20, eos)
    assert len(set(map(len, expected))) > 2
    sampler = make_sampler(PolicyModel(hf), eos, max_new_tokens=20, batch_rows=5, **GREEDY)
    found = sampler.generate(prompts, seeds)
    assert written(found) == expected
    assert [response.ended for response in found] == [row[-1] in eos for row in expected]


def test_a_response_depends_on_its_prompt_and_seed_only(make_sampler, tiny_policy, prompts, seeds):
    jobs = [(prompt, row_seed(seed, sample)) for prompt, seed in zip(prompts, seeds, strict=True) for sample in (0, 1)]
    prompts, seeds = (list(each) for each in zip(*jobs, strict=True))
    policy = tiny_policy()
    sampling = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 0.95}
    eos = range(0, VOCABULARY, 12)
    together = make_sampler(policy, eos, **sampling).generate(prompts, seeds)
    assert len({len(response.tokens) for response in together}) > 3, "rows must end at different places"
    for batch_rows in (1, 3):
        assert_same(make_sampler(policy, eos, batch_rows=batch_rows, **sampling).generate(prompts, seeds), together)
    order = np.random.default_rng(0).permutation(len(jobs))
    mixed = make_sampler(policy, eos, batch_rows=4, **sampling).generate(
        [prompts[place] for place in order], [seeds[place] for place in order]
    )
    assert_same(mixed, [together[place] for place in order])
    assert_same(make_sampler(policy, eos, **sampling).generate(prompts[3:5], seeds[3:5]), together[3:5])
    assert written(together[::2]) != written(together[1::2]), "seeds must matter"


def assert_same(found, expected, within=2e-5):
    assert written(found) == written(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.ended == right.ended
        np.testing.assert_allclose(left.logprobs, right.logprobs, rtol=0, atol=within)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.5}, {"temperature": 1.5, "top_k": 30}, {"temperature": 0.7, "top_p": 0.8}]
)
def test_the_second_token_is_drawn_from_its_exact_distribution(make_sampler, tiny_policy, sampling):
    count, prompt = 6000, np.array([5, 17, 250, 9])
    policy = tiny_policy()
    expected = np.zeros(VOCABULARY)
    first = cut_distribution(policy, [prompt], **sampling)[0]
    longer = [np.append(prompt, token) for token in range(VOCABULARY)]
    for token, row in enumerate(cut_distribution(policy, longer, **sampling)):
        expected += first[token] * row
    sampler = make_sampler(policy, max_new_tokens=2, batch_rows=1000, **sampling)
    found = sampler.generate([prompt] * count, [row_seed(3, place) for place in range(count)])
    for place, wanted in ((0, first), (1, expected)):
        observed = np.bincount([response.tokens[place] for response in found], minlength=VOCABULARY)
        assert chi_square(observed, count * wanted) > 0.01


def cut_distribution(policy, prompts, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """Distribution of the next token by Transformers' own logits processors."""
    tokens = torch.from_numpy(np.stack(prompts))
    states = policy.hf.model(input_ids=tokens).last_hidden_state[:, -1]
    logits = (states @ policy.hf.lm_head.weight.T).detach()
    logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.double().softmax(dim=-1).numpy()


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    assert not observed[expected == 0].any()
    common = expected >= 5
    observed, expected = (np.append(each[common], each[~common].sum()) for each in (observed, expected))
    return stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 20, "top_p": 0.9}])
def test_logprobs_are_what_the_policy_says_of_the_finished_row(make_sampler, tiny_policy, prompts, seeds, sampling):
    policy = tiny_policy()
    found = make_sampler(policy, range(0, VOCABULARY, 20), max_new_tokens=15, **sampling).generate(prompts, seeds)
    for prompt, response in zip(prompts, found, strict=True):
        whole = np.concatenate([prompt, response.tokens])
        bucket = length_bucket([Row(whole, np.arange(len(whole)) >= len(prompt))])
        with torch.no_grad():
            (logprobs,) = policy((bucket,), temperature=sampling.get("temperature", 1.0)).logprobs
        expected = logprobs[0, len(prompt) - 1 :].numpy()
        np.testing.assert_allclose(response.logprobs, expected, rtol=0, atol=2e-5)


def test_the_limit_ends_nothing(make_sampler, prompts, seeds):
    found = make_sampler(max_new_tokens=5).generate(prompts, seeds)
    assert [(len(response.tokens), response.ended) for response in found] == [(5, False)] * len(prompts)


def test_an_end_token_at_the_limit_ends_the_response(make_sampler, prompts, seeds):
    (free,) = written(make_sampler(max_new_tokens=3).generate(prompts[:1], seeds[:1]))
    assert free[2] not in free[:2]
    (found,) = make_sampler(eos=[free[2]], max_new_tokens=3).generate(prompts[:1], seeds[:1])
    assert found.tokens.tolist() == free and found.ended


@pytest.mark.parametrize("count", [1, 40])
def test_all_rows_can_end_with_their_first_token(make_sampler, prompts, seeds, count):
    found = make_sampler(eos=range(VOCABULARY), max_new_tokens=count, batch_rows=3).generate(prompts, seeds)
    assert [(len(response.tokens), response.ended) for response in found] == [(1, True)] * len(prompts)


def test_no_prompts_give_no_responses(make_sampler):
    assert make_sampler().generate([], []) == []


def test_progress_is_told_after_each_batch(make_sampler, prompts, seeds):
    told = []
    make_sampler(max_new_tokens=1, batch_rows=3).generate(prompts, seeds, told.append)
    assert told == [3, 6, 8]


def test_prompts_are_read_once_and_ended_rows_leave(make_sampler, tiny_policy, prompts, seeds):
    policy, asked = tiny_policy(), []
    sampler = make_sampler(policy, range(0, VOCABULARY, 6), max_new_tokens=30)
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(tuple(kwargs["decode"].tokens.shape)), with_kwargs=True
    )
    repeated = [prompt for prompt in prompts for _ in range(3)]
    found = sampler.generate(repeated, [row_seed(1, place) for place in range(len(repeated))])
    lengths = np.array([len(response.tokens) for response in found])
    assert asked[0] == (len(prompts), max(map(len, prompts)))
    assert asked[1:] == [((lengths > step).sum(), 1) for step in range(1, lengths.max())]


def asked_shapes(policy) -> list[tuple[int, ...]]:
    """Rows and tokens of each forward, from now on."""
    asked: list[tuple[int, ...]] = []
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(tuple(kwargs["decode"].tokens.shape)), with_kwargs=True
    )
    return asked


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_end_make_room_for_prompts_that_wait_and_nobody_notices(make_sampler, prompts, name, monkeypatch):
    """Each response is that of its prompt and seed alone, in forwards that are full until nobody waits any more, with a
    cache that grows and is cut every few tokens."""
    monkeypatch.setattr("policy.generation.cache.BLOCK", 3)
    torch.manual_seed(3)
    policy = PolicyModel(MODELS[name]().eval())
    eos, limit, sampling = range(0, SIZES["vocab_size"], 15), 25, {"temperature": 0.9, "top_p": 0.95}
    many = [prompt for prompt in prompts if len(prompt) > 1 for _ in range(6)]
    seeds = [row_seed(5, place) for place in range(len(many))]
    alone = [
        make_sampler(policy, eos, max_new_tokens=limit, **sampling).generate([prompt], [seed])[0]
        for prompt, seed in zip(many, seeds, strict=True)
    ]
    lengths = [len(response.tokens) for response in alone]
    assert len(set(lengths)) > 10 and max(lengths) == limit
    asked, told, columns = asked_shapes(policy), [], []
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(kwargs["decode"].cache.get_seq_length()), with_kwargs=True
    )
    together = make_sampler(policy, eos, max_new_tokens=limit, batch_rows=8, **sampling)
    assert_same(together.generate(many, seeds, told.append), alone, within=1e-4)
    written = [rows for rows, tokens in asked if tokens == 1]
    waiting = written[: len(written) - limit]
    assert max(written) == 8 and len(waiting) > 10 and np.mean(waiting) > 7
    assert sum(written) == sum(lengths) - len(many), "the first tokens come with the prompts"
    assert told == sorted(set(told)) and told[-1] == len(many)
    assert max(columns) < max(map(len, many)) + limit + 3


def test_a_cache_that_takes_no_more_rows_is_filled_anew_when_it_is_empty(make_sampler, tiny_policy, prompts, seeds):
    """As that of Mamba: here a layer of another kind is put into the cache."""
    policy = tiny_policy()
    eos = range(0, VOCABULARY, 8)
    expected = make_sampler(policy, eos, max_new_tokens=12, batch_rows=3).generate(prompts, seeds)
    asked = asked_shapes(policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("policy.generation.hf.takes_more_rows", lambda cache: False)
        found = make_sampler(policy, eos, max_new_tokens=12, batch_rows=3).generate(prompts, seeds)
    assert_same(found, expected)
    assert sum(tokens > 1 for _, tokens in asked) == 3, "eight prompts, three at a time"


def test_responses_longer_than_a_block_of_the_cache_are_those_of_generate(make_sampler, prompts, seeds):
    torch.manual_seed(3)
    hf = MODELS["llama"]().eval()
    count = 2 * BLOCK + 9
    expected = generated(hf, prompts[:3], count, ())
    sampler = make_sampler(PolicyModel(hf), max_new_tokens=count, batch_rows=2, **GREEDY)
    held = []
    hf.model.register_forward_hook(
        lambda module, args, output: held.append(output.past_key_values.layers[0]), with_kwargs=False
    )
    assert written(sampler.generate(prompts[:3], seeds[:3])) == expected
    longest = max(map(len, prompts[:3]))
    (layer,) = {id(each): each for each in held[-5:]}.values()
    assert layer.buffers[0].shape[2] <= longest + count + BLOCK


class Card:
    """Memory for so many rows: a forward of more runs out of it, as torch says it."""

    def __init__(self, policy, rows: int) -> None:
        self.rows, self.refused = rows, 0
        policy.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs) -> None:
        if len(kwargs["decode"].tokens) > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")


@pytest.mark.parametrize("room", [1, 3, 5])
def test_rows_that_do_not_fit_are_halved_and_said_once(make_sampler, tiny_policy, prompts, room, caplog):
    policy = tiny_policy()
    eos, limit = range(0, VOCABULARY, 10), 12
    many = [prompt for prompt in prompts for _ in range(2)]
    seeds = [row_seed(9, place) for place in range(len(many))]
    expected = make_sampler(policy, eos, max_new_tokens=limit).generate(many, seeds)
    card = Card(policy, room)
    sampler = make_sampler(policy, eos, max_new_tokens=limit, batch_rows=8)
    assert_same(sampler.generate(many, seeds), expected)
    halved = {1: [4, 2, 1], 3: [4, 2], 5: [4]}[room]
    said = [record.getMessage() for record in caplog.records if "do not fit into memory" in record.getMessage()]
    assert [line.partition("): ")[2].split()[0] for line in said] == list(map(str, halved))
    assert all("CUDA out of memory. Tried to allocate 20.00 MiB.): " in line for line in said)
    refused = card.refused
    assert refused == len(halved)
    assert_same(sampler.generate(many, seeds), expected)
    assert card.refused == refused, "what did not fit once is not tried again"


def test_what_is_halved_is_what_there_was_and_not_what_there_might_have_been(
    make_sampler, tiny_policy, prompts, caplog
):
    """Five rows of at most 64: the next try is one of two, and one row is tried once."""
    policy = tiny_policy()
    card = Card(policy, 2)
    sampler = make_sampler(policy, max_new_tokens=2, batch_rows=64)
    sampler.generate(prompts[:5], range(5))
    assert card.refused == 1
    assert "5 responses at once do not fit" in caplog.text and ": 2 from now on" in caplog.text
    card.rows, card.refused = 0, 0
    with pytest.raises(torch.OutOfMemoryError):
        make_sampler(policy, max_new_tokens=2, batch_rows=64).generate(prompts[:1], [1])
    assert card.refused == 1


def test_memory_that_runs_out_halfway_loses_no_response_that_is_done(make_sampler, tiny_policy, prompts, seeds):
    policy = tiny_policy()
    eos = range(0, VOCABULARY, 8)
    expected = make_sampler(policy, eos, max_new_tokens=20).generate(prompts, seeds)
    asked, told = asked_shapes(policy), []

    def run_out(module, args, kwargs) -> None:
        if len(asked) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    policy.register_forward_pre_hook(run_out, with_kwargs=True)
    sampler = make_sampler(policy, eos, max_new_tokens=20, batch_rows=8)
    assert_same(sampler.generate(prompts, seeds, told.append), expected)
    begun_anew = sum(rows for rows, tokens in asked[7:] if tokens > 1)
    assert 0 < begun_anew < len(set(map(bytes, prompts)))


def test_one_row_that_does_not_fit_is_a_shortage(make_sampler, tiny_policy, prompts, seeds):
    policy = tiny_policy()
    Card(policy, 0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        make_sampler(policy, max_new_tokens=2).generate(prompts, seeds)
    with pytest.raises(ZeroDivisionError):  # what is no shortage is not tried again
        policy.register_forward_pre_hook(lambda *given: 1 // 0, prepend=True)
        make_sampler(policy, max_new_tokens=2).generate(prompts, seeds)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_a_model_with_flash_attention_is_sampled_from_with_sdpa(make_sampler, tiny_policy, prompts, seeds, name):
    """Here, where it is not installed, any call of it would fail."""
    policy = tiny_policy()
    expected = make_sampler(policy, max_new_tokens=4).generate(prompts, seeds)
    policy.hf.config._attn_implementation_internal = name
    found = make_sampler(policy, max_new_tokens=4).generate(prompts, seeds)
    assert_same(found, expected)
    assert policy.hf.config._attn_implementation == name


def stopped_by_hand(tokenizer, tokens, stop) -> list[int]:
    for count in range(1, len(tokens) + 1):
        if stop in tokenizer.decode(tokens[:count]):
            return tokens[:count]
    return tokens


def test_a_stop_string_ends_the_response_with_the_token_that_completes_it(
    make_sampler, tiny_tokenizer, tiny_policy, prompts, seeds
):
    policy = tiny_policy()
    free = written(make_sampler(policy, max_new_tokens=30).generate(prompts, seeds))
    text = tiny_tokenizer.decode(free[0])
    second = tiny_tokenizer.decode(free[0][:10]), tiny_tokenizer.decode(free[0][:12])
    within, spanning = tiny_tokenizer.decode(free[1][7:8]), second[1][len(second[0]) - 1 :]
    assert len(spanning) > 1 and spanning in text and all(spanning not in tiny_tokenizer.decode(t) for t in free[0])
    for stop in (within, spanning):
        sampler = make_sampler(policy, tokenizer=tiny_tokenizer, max_new_tokens=30, stop=("never written", stop))
        found = sampler.generate(prompts, seeds)
        expected = [stopped_by_hand(tiny_tokenizer, row, stop) for row in free]
        assert written(found) == expected
        assert [response.ended for response in found] == [stop in tiny_tokenizer.decode(row) for row in expected]
        assert any(len(row) < 30 for row in expected)


def test_sampling_leaves_the_model_as_it_was(tiny_policy, make_sampler, prompts, seeds):
    policy = tiny_policy()
    sampler = make_sampler(policy, max_new_tokens=3)
    policy.train()
    policy.hf.requires_grad_(True)
    sampler.generate(prompts, seeds)
    assert policy.training and policy.hf.model.layers[0].training
    assert policy.hf.config._attn_implementation == "sdpa"
    bucket = length_bucket([Row(prompts[0], prompts[0] >= 0)])
    policy((bucket,)).logprobs[0].sum().backward()
    assert policy.hf.model.embed_tokens.weight.grad.abs().sum() > 0


def test_weights_that_are_no_numbers_are_told(tiny_policy, make_sampler, prompts, seeds):
    policy = tiny_policy()
    with torch.no_grad():
        policy.hf.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="8 responses were drawn from logits that are not finite"):
        make_sampler(policy, max_new_tokens=3).generate(prompts, seeds)


def test_prompts_without_seeds_or_tokens_are_refused(make_sampler, prompts, seeds):
    sampler = make_sampler()
    with pytest.raises(ValueError, match="8 prompts, 7 seeds"):
        sampler.generate(prompts, seeds[1:])
    with pytest.raises(ValueError, match="no empty prompt"):
        sampler.generate([np.array([], np.int64)], seeds[:1])
    with pytest.raises(ConfigError, match="empty stop string"):
        make_sampler(stop=("",), tokenizer=object())


def test_seeds_tell_everything_apart():
    parts = [(a, b, c) for a in range(-1, 3) for b in range(12) for c in range(12)]
    found = {row_seed(*each) for each in parts} | {row_seed(1, 23), row_seed(12, 3)}
    assert len(found) == len(parts) + 2
    assert all(0 <= seed < 2**64 for seed in found)
    assert np.array_equal(row_uniforms(5, 3), row_uniforms(5, 9)[:3])
