import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.core import logprobs
from rlhf.core.logprobs import response_logprobs, token_logprobs


def make_batch(rows=4, tokens=9, features=6, vocabulary=31, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, features, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows, tokens), generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < 0.6
    mask[1] = False
    return hidden, weight, bias, targets, mask


def row_by_row(hidden, weight, bias, targets, mask, scale, softcap):
    """The same sums from whole rows of logits and cross-entropy, one row at a time."""
    sums = []
    for row, ids, selected in zip(hidden, targets, mask, strict=True):
        logits = scale * (row @ weight.T + bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        sums.append(-F.cross_entropy(logits[selected], ids[selected], reduction="sum"))
    return torch.stack(sums)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (0.5, 3.0)])
@pytest.mark.parametrize("frozen", [(), (1, 2), (0,)], ids=["all trained", "head frozen", "states frozen"])
def test_sums_and_gradients_are_those_of_whole_logits(chunk_tokens, scale, softcap, frozen):
    *tensors, targets, mask = make_batch()
    leaves = [tensor.requires_grad_(place not in frozen) for place, tensor in enumerate(tensors)]
    twins = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    hidden, weight, bias = leaves
    sums, counts = response_logprobs(
        hidden,
        weight,
        targets,
        mask,
        head_bias=bias,
        chunk_tokens=chunk_tokens,
        logit_scale=scale,
        softcap=softcap,
    )
    expected = row_by_row(*twins, targets, mask, scale, softcap)
    torch.testing.assert_close(sums, expected)
    assert counts.tolist() == mask.sum(1).tolist()
    (sums * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert (leaf.grad is None) != leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, twin.grad)


def test_square_sums_tell_how_peaked_a_distribution_is():
    hidden, weight, bias, targets, mask = make_batch()
    found = token_logprobs(hidden, weight, targets, mask, head_bias=bias, chunk_tokens=3, with_square_sums=True)
    expected = (hidden @ weight.T + bias).softmax(-1).square().sum(-1).log() * mask
    torch.testing.assert_close(found.square_sums, expected)
    sums, _ = response_logprobs(hidden, weight, targets, mask, head_bias=bias)
    torch.testing.assert_close(found.logprobs.sum(1), sums)


SHAPES = [
    {},
    {"logit_scale": 0.25},
    {"logit_scale": 0.5, "softcap": 3.0},
    {"temperature": 0.7},
    {"logit_scale": 0.5, "softcap": 3.0, "temperature": 1.6},
]


def whole_rows(hidden, weight, bias, targets, mask, *, logit_scale=1.0, softcap=None, temperature=1.0):
    """Log-probabilities and entropies from torch's own categorical distribution over whole logits."""
    logits = logit_scale * (hidden @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.distributions.Categorical(logits=logits / temperature)
    return rows.log_prob(targets) * mask, rows.entropy() * mask


@pytest.mark.parametrize("chunk_tokens", [4, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frozen", [(), (1, 2), (0,), (1,)], ids=["none", "head", "states", "weight"])
def test_entropies_and_log_probabilities_have_the_gradients_of_whole_logits(chunk_tokens, shape, frozen):
    *tensors, targets, mask = make_batch()
    leaves = [tensor.requires_grad_(place not in frozen) for place, tensor in enumerate(tensors)]
    twins = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    upstreams = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden, weight, bias = leaves
    found = token_logprobs(
        hidden, weight, targets, mask, head_bias=bias, chunk_tokens=chunk_tokens, with_entropies=True, **shape
    )
    expected = whole_rows(*twins, targets, mask, **shape)
    torch.testing.assert_close((found.logprobs, found.entropies), expected)
    (found.logprobs * upstreams[0] + found.entropies * upstreams[1]).sum().backward()
    (expected[0] * upstreams[0] + expected[1] * upstreams[1]).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert (leaf.grad is None) != leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("used", ["logprobs", "entropies"])
def test_either_output_may_be_left_out_of_the_loss(trained, used):
    hidden, weight, bias, targets, mask = make_batch()
    twin = hidden.clone().requires_grad_()
    expected = dict(zip(("logprobs", "entropies"), whole_rows(twin, weight, bias, targets, mask), strict=True))
    expected[used].sum().backward()
    found = token_logprobs(
        hidden.requires_grad_(), weight.requires_grad_(trained), targets, mask, head_bias=bias, with_entropies=True
    )
    getattr(found, used).sum().backward()
    torch.testing.assert_close(hidden.grad, twin.grad)


def test_slopes_agree_with_finite_differences():
    hidden, weight, bias, targets, mask = make_batch(rows=2, tokens=3, features=3, vocabulary=5)
    mask[:] = torch.tensor([[True, True, False], [False, True, True]])

    def ask(hidden, weight, bias):
        options = {"softcap": 2.0, "logit_scale": 0.8, "temperature": 1.3, "chunk_tokens": 3}
        found = token_logprobs(hidden, weight, targets, mask, head_bias=bias, with_entropies=True, **options)
        return found.logprobs, found.entropies

    assert torch.autograd.gradcheck(ask, [tensor.requires_grad_() for tensor in (hidden, weight, bias)])


def test_entropies_run_from_zero_to_log_vocabulary_in_float32_without_nan():
    mask = torch.ones(1, 3, dtype=torch.bool)
    hidden = torch.tensor([[[0.0], [1e4], [-1e4]]], requires_grad=True)
    weight = torch.linspace(-1, 1, 8)[:, None].requires_grad_()
    found = token_logprobs(hidden, weight, torch.zeros(1, 3, dtype=torch.int64), mask, with_entropies=True).entropies
    torch.testing.assert_close(found, torch.tensor([[math.log(8), 0.0, 0.0]]))
    found.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.zeros(1, 3, 1), rtol=0, atol=1e-6)
    assert bool(torch.isfinite(weight.grad).all())


def test_a_temperature_is_a_scale_of_uncapped_logits_and_sharpens_below_one():
    hidden, weight, bias, targets, mask = make_batch()
    ask = {"head_bias": bias, "with_entropies": True, "with_square_sums": True}
    cold = token_logprobs(hidden, weight, targets, mask, temperature=0.5, **ask)
    scaled = token_logprobs(hidden, weight, targets, mask, logit_scale=2.0, **ask)
    plain = token_logprobs(hidden, weight, targets, mask, **ask)
    torch.testing.assert_close(cold, scaled)
    assert bool((cold.entropies[mask] < plain.entropies[mask]).all())


def test_what_is_not_asked_for_is_not_given():
    hidden, weight, _, targets, mask = make_batch()
    found = token_logprobs(hidden.requires_grad_(), weight, targets, mask)
    assert found.entropies is None
    assert found.square_sums is None


@pytest.mark.parametrize("with_entropies", [False, True])
def test_a_frozen_head_keeps_one_state_per_token_and_output(with_entropies):
    hidden, weight, _, targets, mask = make_batch(features=2, vocabulary=500)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        token_logprobs(hidden.requires_grad_(), weight, targets, mask, with_entropies=with_entropies)
    assert kept.count(hidden[mask].shape) == 1 + with_entropies
    assert weight.shape not in kept


@pytest.mark.parametrize("with_entropies", [False, True])
def test_a_frozen_head_is_projected_once(monkeypatch, with_entropies):
    hidden, weight, _, targets, mask = make_batch()
    calls = []
    monkeypatch.setattr(logprobs, "_logits", lambda *args, real=logprobs._logits: calls.append(1) or real(*args))
    for trained in (False, True):
        calls.clear()
        hidden.grad = None
        weight.requires_grad_(trained)
        found = token_logprobs(hidden.requires_grad_(), weight, targets, mask, with_entropies=with_entropies)
        found.logprobs.sum().backward()
        assert len(calls) == 1 + trained


def test_a_uniform_head_gives_minus_log_vocabulary_per_token():
    mask = torch.tensor([[True, True, False], [False, False, True]])
    targets = torch.zeros(2, 3, dtype=torch.int64)
    sums, counts = response_logprobs(torch.ones(2, 3, 4), torch.zeros(5, 4), targets, mask)
    torch.testing.assert_close(sums, -torch.tensor([5.0, 5.0]).log() * torch.tensor([2, 1]))
    assert counts.tolist() == [2, 1]


def test_targets_outside_the_response_are_never_read():
    hidden, weight, _, targets, mask = make_batch()
    spoiled = torch.where(mask, targets, -100)
    expected, _ = response_logprobs(hidden, weight, targets, mask)
    torch.testing.assert_close(response_logprobs(hidden, weight, spoiled, mask)[0], expected, rtol=0, atol=0)


def test_an_ignored_label_inside_the_response_is_an_error_not_a_zero():
    hidden, weight, _, targets, mask = make_batch()
    with pytest.raises(RuntimeError, match="out of bounds"):
        response_logprobs(hidden, weight, torch.full_like(targets, -100), mask)


def test_a_batch_without_response_tokens_keeps_hidden_and_head_in_the_graph():
    hidden, weight, _, targets, mask = make_batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    sums, counts = response_logprobs(hidden, weight, targets, torch.zeros_like(mask))
    sums.sum().backward()
    assert sums.tolist() == [0, 0, 0, 0]
    assert counts.tolist() == [0, 0, 0, 0]
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_half_precision_states_are_summed_in_single_precision():
    hidden, weight, _, targets, _ = make_batch(rows=2, tokens=400)
    mask = torch.ones_like(targets, dtype=torch.bool)
    sums, _ = response_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, mask)
    whole = (hidden.bfloat16().double() @ weight.bfloat16().double().T).log_softmax(-1)
    expected = whole.gather(2, targets[..., None]).squeeze(2).sum(1)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def largest_tensor(compute, *leaves):
    with LargestTensor() as largest:
        compute(*(leaf.detach().requires_grad_() for leaf in leaves)).sum().backward()
    return largest.elements


def test_forward_and_backward_hold_one_chunk_of_logits_at_most():
    rows, tokens, vocabulary, chunk_tokens = 4, 64, 1000, 16
    hidden, weight, _, targets, _ = make_batch(rows, tokens, features=8, vocabulary=vocabulary)
    mask = torch.ones_like(targets, dtype=torch.bool)

    def chunked(hidden, weight):
        return response_logprobs(hidden, weight, targets, mask, chunk_tokens=chunk_tokens)[0]

    def with_entropies(hidden, weight):
        found = token_logprobs(hidden, weight, targets, mask, chunk_tokens=chunk_tokens, with_entropies=True)
        return found.logprobs + found.entropies

    def whole(hidden, weight):
        return (hidden @ weight.T).log_softmax(-1).gather(2, targets[..., None])

    assert largest_tensor(whole, hidden, weight) == rows * tokens * vocabulary
    assert largest_tensor(chunked, hidden, weight) == chunk_tokens * vocabulary
    assert largest_tensor(with_entropies, hidden, weight) == chunk_tokens * vocabulary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [2**26, 4 * 6 * 7], ids=["one block", "blocks of 7 tokens"])
def test_logits_of_low_precision_are_added_up_and_kept_in_float32(dtype, block_bytes, monkeypatch):
    """Those of SmolLM2, rounded to bfloat16, were .018 nats a token off."""
    monkeypatch.setattr(logprobs, "BLOCK_BYTES", block_bytes)
    hidden, weight, bias, targets, mask = make_batch(vocabulary=300)
    hidden, weight, bias = ((5 * values).to(dtype) for values in (hidden, weight, bias))
    exact = [values.double() for values in (hidden, weight, bias)]
    for shape in ({}, {"softcap": 20.0, "logit_scale": 0.5, "temperature": 1.3}):
        found = token_logprobs(hidden, weight, targets, mask, head_bias=bias, with_entropies=True, **shape)
        expected = token_logprobs(*exact[:2], targets, mask, head_bias=exact[2], with_entropies=True, **shape)
        assert found.logprobs.dtype == torch.float32
        torch.testing.assert_close(found.logprobs.double(), expected.logprobs, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.entropies.double(), expected.entropies, rtol=1e-4, atol=1e-4)
    sampled = logprobs.head_logits(hidden[0], weight, head_bias=bias)
    torch.testing.assert_close(sampled.double(), exact[0][0] @ exact[1].T + exact[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("places", [1, 255, 600])
def test_float32_keeps_its_numbers_bit_for_bit(places):
    """Those of a projection by F.linear, 256 places at a time."""
    generator = torch.Generator().manual_seed(places)
    hidden, weight = (torch.randn(count, 16, generator=generator) for count in (places, 90))
    targets = torch.randint(90, (1, places), generator=generator)
    expected = []
    for part, ids in zip(hidden.split(256), targets[0].split(256), strict=True):
        logits = F.linear(part, weight)
        expected.append(logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(dim=-1))
    found = token_logprobs(hidden[None], weight, targets, torch.ones_like(targets, dtype=torch.bool)).logprobs
    assert torch.equal(found[0], torch.cat(expected))
    assert torch.equal(logprobs.head_logits(hidden, weight), F.linear(hidden, weight))


def test_logits_of_a_huge_vocabulary_take_no_more_memory_than_they_may():
    assert logprobs.tokens_at_once(49_152) == logprobs.tokens_at_once(262_144) == 256
    assert logprobs.tokens_at_once(524_288) == 128 and logprobs.tokens_at_once(10**9) == 1


def test_logits_are_not_kept_for_the_backward_pass():
    hidden, weight, _, targets, mask = make_batch(features=2, vocabulary=500)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        response_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, mask, chunk_tokens=4)
    assert max(kept) == weight.numel() < 4 * 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(4, 8, dtype=torch.int64)}, r"'targets': \(4, 8\)"),
        ({"response_mask": torch.ones(4, 9, dtype=torch.int64)}, "'response_mask' must be a .* bool mask"),
        ({"chunk_tokens": 0}, "chunk_tokens must be greater than 0"),
        ({"softcap": 0.0}, "softcap must be greater than 0"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, _, targets, mask = make_batch()
    arguments = {"hidden": hidden, "head_weight": weight, "targets": targets, "response_mask": mask}
    with pytest.raises(ValueError, match=message):
        response_logprobs(**(arguments | change))


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_adds_up_and_keeps_logits_in_float32(monkeypatch, dtype):
    """CUDA can do it in one call, without a float32 copy of the weights; HIP cannot."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, generator=generator).to(dtype)
    weight = torch.randn(11, 16, generator=generator).to(dtype)
    calls, plain = [], torch.mm

    def mm(first, second, *, out_dtype=None, out=None):
        calls.append((first.dtype, second.dtype, out_dtype))
        if out_dtype is None:
            return plain(first, second, out=out)
        return plain(first.as_subclass(torch.Tensor).to(out_dtype), second.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.version, "hip", None)
    expected = hidden.double() @ weight.double().T
    found = logprobs._float32_product(hidden.as_subclass(OnGpu), weight)
    assert calls == [(dtype, dtype, torch.float32)] and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    calls.clear()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    again = logprobs._float32_product(hidden.as_subclass(OnGpu), weight)
    assert {call[2] for call in calls} == {None}
    torch.testing.assert_close(again.as_subclass(torch.Tensor).double(), expected, rtol=1e-5, atol=1e-5)
