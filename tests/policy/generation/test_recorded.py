"""Recorded forwards against forwards of their own: the same tokens, whatever comes and goes between them."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from policy.generation.api import row_seed
from policy.generation.cache import RoomyLayer
from policy.generation.recorded import cuda_graph
from policy.model import PolicyModel
from tests.policy.generation.tape import Tape
from tests.policy.generation.test_hf import MODELS, SIZES, Card, assert_same

OTHERS = {
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=340, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.3)
    ),
    "norms of queries and keys": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "sliding window": MODELS["sliding window"],
    "mixed layers, capped logits": MODELS["mixed layers, capped logits"],
    "mixed layers": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2)
    ),
    "rotations of a part": lambda: StableLmForCausalLM(StableLmConfig(**SIZES, partial_rotary_factor=0.5)),
}
RECORDED = {name: MODELS[name] for name in ("llama", "as many key heads as query heads")} | OTHERS


def policy_of(make) -> PolicyModel:
    torch.manual_seed(3)
    return PolicyModel(make().eval())


def asked_for(prompts, times: int) -> tuple[list, list[int]]:
    many = [prompt for prompt in prompts for _ in range(times)]
    return many, [row_seed(5, place) for place in range(len(many))]


@pytest.mark.parametrize("name", RECORDED)
def test_rows_that_come_and_go_write_what_they_write_without_a_recording(make_sampler, prompts, name, monkeypatch):
    monkeypatch.setattr("policy.generation.recorded.GROWTH", 5)
    monkeypatch.setattr("policy.generation.recorded.COLUMNS", 4)
    monkeypatch.setattr("policy.generation.recorded.SPARE", 0.0)
    policy, (many, seeds) = policy_of(RECORDED[name]), asked_for(prompts, 6)
    eos, sampling = range(0, SIZES["vocab_size"], 15), {"max_new_tokens": 30, "batch_rows": 8, "temperature": 0.9}
    tape = Tape()
    sampler = make_sampler(policy, eos, record=tape, **sampling)
    expected = make_sampler(policy, eos, **sampling).generate(many, seeds)
    lengths = [len(response.tokens) for response in expected]
    assert len(set(lengths)) > 10 and max(lengths) == 30
    for _ in range(2):  # weights may change between calls, and do here
        assert_same(sampler.generate(many, seeds), expected)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(0.9)
        expected = make_sampler(policy, eos, **sampling).generate(many, seeds)
    assert tape.replayed > 4 * tape.recorded > 8
    assert set(tape.rows) == {8, 4, 2, 1}, "halves of the buffers, as rows end and none wait"


@pytest.mark.parametrize(("spare", "recorded"), [(0.0, {8, 4, 2, 1}), (0.5, {8, 4, 2}), (10.0, {8})])
def test_rows_that_have_ended_stay_where_they_cost_less_than_a_recording(
    make_sampler, tiny_policy, prompts, monkeypatch, spare, recorded
):
    monkeypatch.setattr("policy.generation.recorded.SPARE", spare)
    policy, (many, seeds), tape = tiny_policy(), asked_for(prompts, 1), Tape()
    eos, sampling = range(0, 321, 12), {"max_new_tokens": 60, "batch_rows": 8}
    expected = make_sampler(policy, eos, **sampling).generate(many, seeds)
    assert_same(make_sampler(policy, eos, record=tape, **sampling).generate(many, seeds), expected)
    assert set(tape.rows) == recorded


def test_a_forward_is_recorded_once_where_the_buffers_suffice(make_sampler, tiny_policy, prompts, seeds):
    tape = Tape()
    sampler = make_sampler(tiny_policy(), record=tape, max_new_tokens=60, batch_rows=8)
    sampler.generate(prompts, seeds)
    assert (tape.recorded, tape.replayed) == (1, 59)


def test_memory_is_that_of_the_rows_and_their_tokens(make_sampler, tiny_policy, prompts, seeds):
    policy, held = tiny_policy(), []
    policy.hf.model.register_forward_hook(lambda module, args, found: held.append(found.past_key_values.layers[0]))
    make_sampler(policy, record=Tape(), max_new_tokens=30).generate(prompts[:5], seeds[:5])
    assert held[-1].buffers[0].shape[0] == 8, "five rows, and a power of two"
    assert max(map(len, prompts[:5])) + 30 <= held[-1].buffers[0].shape[2] <= 64


def test_weights_of_low_precision_are_recorded_too(make_sampler, tiny_policy, prompts, seeds, caplog):
    """Rounding depends on the columns of the buffers, so that tokens may differ where they are nearly as likely."""
    policy, tape = tiny_policy().to(torch.bfloat16), Tape()
    expected = make_sampler(policy, max_new_tokens=20).generate(prompts, seeds)
    found = make_sampler(policy, record=tape, max_new_tokens=20).generate(prompts, seeds)
    assert tape.replayed == 19 and not caplog.records
    pairs = zip(found, expected, strict=True)
    assert sum(one.tokens[:5].tolist() == other.tokens[:5].tolist() for one, other in pairs) > 4


def layer_of(*parts: torch.Tensor) -> RoomyLayer:
    layer = RoomyLayer()
    for part in parts:
        layer.update(part, -part)
    return layer


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_rows_join_others_in_buffers_as_in_new_ones(columns):
    """To the left, where leading columns are nobody's any more, or to the right; a copy onto itself would be torn."""
    there, more = torch.randn(2, 1, 3, 4), torch.randn(3, 1, 2, 4)
    found, expected = layer_of(there), layer_of(there)
    found.reserve(6, 5)
    buffers = found.buffers
    for layer in (found, expected):
        layer.align([layer_of(more)], columns)
    assert found.buffers is buffers and expected.buffers is not buffers
    torch.testing.assert_close((found.keys, found.values), (expected.keys, expected.values), rtol=0, atol=0)
    found.align([layer_of(more)], columns)
    assert found.buffers is not buffers, "eight rows are more than six"


def test_penalties_stop_strings_and_limits_are_those_of_other_rows(
    make_sampler, tiny_policy, tiny_tokenizer, prompts, seeds
):
    policy = tiny_policy()
    sampling = {"max_new_tokens": 20, "top_p": 0.9, "top_k": 50, "temperature": 1.3, "stop": ("a",)}
    expected = make_sampler(policy, tokenizer=tiny_tokenizer, **sampling).generate(prompts, seeds)
    tape = Tape()
    assert_same(
        make_sampler(policy, tokenizer=tiny_tokenizer, record=tape, **sampling).generate(prompts, seeds), expected
    )
    assert tape.replayed


UNLIKE = {
    "eager attention": MODELS["eager attention"],
    "short convolutions": lambda: Lfm2ForCausalLM(
        Lfm2Config(**SIZES | {"num_hidden_layers": 2}, layer_types=["conv", "full_attention"])
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_models_that_see_columns_in_another_way_are_not_recorded(make_sampler, prompts, seeds, name, caplog):
    policy, tape = policy_of(UNLIKE[name]), Tape()
    expected = make_sampler(policy, max_new_tokens=9).generate(prompts, seeds)
    assert_same(make_sampler(policy, record=tape, max_new_tokens=9).generate(prompts, seeds), expected)
    assert tape.recorded == 0 and "CUDA graph" not in caplog.text


def test_nothing_is_recorded_without_cuda_graphs(make_sampler, tiny_policy, prompts, seeds):
    tape = Tape()
    make_sampler(tiny_policy(), record=tape, max_new_tokens=5, cuda_graphs=False).generate(prompts, seeds)
    assert tape.recorded == 0


def reads_a_number(module, args, found):
    if found[0].sum().item() == 0:
        raise AssertionError


def test_a_model_that_waits_for_the_device_is_said_once_and_writes_all_the_same(
    make_sampler, tiny_policy, prompts, seeds, caplog
):
    policy = tiny_policy()
    expected = make_sampler(policy, max_new_tokens=12).generate(prompts, seeds)
    policy.hf.model.norm.register_forward_hook(reads_a_number)
    tape = Tape()
    sampler = make_sampler(policy, record=tape, max_new_tokens=12)
    for _ in range(2):
        assert_same(sampler.generate(prompts, seeds), expected)
    (said,) = caplog.records
    assert "without a CUDA graph" in said.getMessage() and "not permitted when stream is" in said.getMessage()
    assert (tape.recorded, tape.replayed) == (0, 0)


def test_a_recording_that_gives_something_else_is_not_used(make_sampler, tiny_policy, prompts, seeds, caplog):
    policy, wrong = tiny_policy(), Tape()
    expected = make_sampler(policy, max_new_tokens=12).generate(prompts, seeds)

    def record(compute):
        again = wrong(compute)
        return lambda: again().roll(1, dims=1)

    sampler = make_sampler(policy, record=record, max_new_tokens=12)
    assert_same(sampler.generate(prompts, seeds), expected)
    (said,) = caplog.records
    assert "log-probabilities differ by" in said.getMessage() and wrong.replayed == 1


def test_logits_that_rule_tokens_out_are_compared_by_the_others(make_sampler, tiny_policy, prompts, seeds, caplog):
    policy, tape = tiny_policy(), Tape()
    head = policy.hf.get_output_embeddings()
    head.register_forward_hook(lambda module, args, found: found.index_fill(1, torch.tensor([5, 9]), -torch.inf))
    sampler = make_sampler(policy, record=tape, max_new_tokens=6)
    found = sampler.generate(prompts, seeds)
    assert tape.replayed == 5 and not caplog.records
    assert not {5, 9} & {int(token) for response in found for token in response.tokens}


def broken(tape: Tape, at: int, error: Exception):
    """A way to record that fails at the ``at``-th time."""
    tries = []

    def record(compute):
        tries.append(1)
        if len(tries) == at:
            raise error
        return tape(compute)

    return record


SHORTAGE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("error", [RuntimeError("this kernel cannot be captured"), SHORTAGE])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "sliding window"])
def test_rows_go_on_where_a_recording_fails_while_others_wait(
    make_sampler, prompts, name, at, error, caplog, monkeypatch
):
    """With caches of the same kind as before: those that come in are joined to those that are there."""
    monkeypatch.setattr("policy.generation.recorded.GROWTH", 5)
    monkeypatch.setattr("policy.generation.recorded.COLUMNS", 4)
    policy, (many, seeds), tape = policy_of(RECORDED[name]), asked_for(prompts, 5), Tape()
    eos, sampling = range(0, SIZES["vocab_size"], 15), {"max_new_tokens": 30, "batch_rows": 8}
    expected = make_sampler(policy, eos, **sampling).generate(many, seeds)
    sampler = make_sampler(policy, eos, record=broken(tape, at, error), **sampling)
    assert_same(sampler.generate(many, seeds), expected)
    (said,) = caplog.records
    assert "without a CUDA graph" in said.getMessage() and str(error) in said.getMessage()
    assert tape.recorded == at - 1
    assert_same(make_sampler(policy, eos, record=tape, **sampling).generate(many, seeds), expected)
    assert tape.recorded == at - 1, "another sampler of the policy does not try again"


def test_memory_that_is_short_without_a_recording_halves_the_rows(make_sampler, tiny_policy, prompts, seeds, caplog):
    policy, tape = tiny_policy(), Tape()
    expected = make_sampler(policy, max_new_tokens=12).generate(prompts, seeds)
    Card(policy, 5)
    sampler = make_sampler(policy, record=broken(tape, 1, SHORTAGE), max_new_tokens=12, batch_rows=8)
    assert_same(sampler.generate(prompts, seeds), expected)
    assert "4 from now on" in caplog.text


def test_what_python_counts_is_found_in_the_second_token(make_sampler, tiny_policy, prompts, seeds, caplog):
    """A model that asks its cache how long it is gets a number that stays what it was: right once, and then wrong."""
    policy = tiny_policy()
    backbone, lengths = policy.hf.model, []
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["past_key_values"].get_seq_length()), with_kwargs=True
    )
    backbone.register_forward_hook(
        lambda module, args, found: type(found)(last_hidden_state=found.last_hidden_state * (1 + lengths[-1] / 50))
    )
    expected = make_sampler(policy, max_new_tokens=12).generate(prompts, seeds)
    tape = Tape()
    assert_same(make_sampler(policy, record=tape, max_new_tokens=12).generate(prompts, seeds), expected)
    assert "log-probabilities differ by" in caplog.text and tape.replayed == 2


def test_a_window_that_is_wrong_is_found_where_it_matters_first(make_sampler, prompts, seeds, caplog, monkeypatch):
    policy = policy_of(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=20)))
    expected = make_sampler(policy, max_new_tokens=30).generate(prompts, seeds)
    monkeypatch.setattr("policy.generation.recorded._kinds", lambda policy: {"full_attention"})
    monkeypatch.setattr("policy.generation.recorded._window", lambda policy: 20)
    tape = Tape()
    assert_same(make_sampler(policy, record=tape, max_new_tokens=30).generate(prompts, seeds), expected)
    assert "log-probabilities differ by" in caplog.text and tape.replayed > 3


def test_the_stand_in_does_nothing_but_the_operations_again():
    """What the proofs above stand on: a number that Python knew is that of the recording."""
    number, values = [2.0], torch.arange(3.0)
    again = Tape()(lambda: values * number[0])
    values += 1
    number[0] = 5.0
    np.testing.assert_array_equal(again().numpy(), [2.0, 4.0, 6.0])


class Driver:
    """What :func:`cuda_graph` asks of torch.cuda, in the order of the calls; ``broken`` are calls that raise."""

    def __init__(self, monkeypatch, broken=()) -> None:
        self.calls, self.streams, self.broken = [], ["own"], broken
        self.mode = "default"
        for name in ("synchronize", "empty_cache", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, self._call(name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self._set_mode)
        monkeypatch.setattr(torch.cuda, "stream", self._on_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", self._call("end_allocation"))
        monkeypatch.setattr("policy.generation.recorded._stream", lambda device: self)
        self.capture_begin, self.capture_end, self.replay = map(self._call, ("begin", "end", "replay"))

    def _call(self, name):
        def called(*given, **named):
            self.calls.append(name)
            if name in self.broken:
                raise RuntimeError(name)

        return called

    def _set_mode(self, mode) -> None:
        self.mode = mode
        warnings.warn(  # as torch does
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=1,
        )

    @contextlib.contextmanager
    def _on_stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def wait_stream(self, other) -> None:
        self.calls.append("wait")


def test_a_graph_is_recorded_on_a_stream_of_its_own_after_a_trial(monkeypatch):
    driver, modes = Driver(monkeypatch), []
    again = cuda_graph(lambda: (modes.append((driver.mode, len(driver.streams))), torch.ones(2))[1])
    assert modes == [("warn", 2), ("default", 2)], "the trial is watched for waits"
    assert driver.calls == ["wait", "wait", "synchronize", "empty_cache", "graph_pool_handle", "begin", "end"]
    assert again().tolist() == [1, 1] and driver.calls[-1] == "replay" and driver.streams == ["own"]


def test_what_waits_is_found_before_anything_is_recorded(monkeypatch):
    driver = Driver(monkeypatch)

    def compute():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return torch.ones(2)

    with pytest.raises(RuntimeError, match=r"waits for the GPU at .*test_recorded.py:\d+"):
        cuda_graph(compute)
    assert "begin" not in driver.calls and driver.streams == ["own"] and driver.mode == "default"


@pytest.mark.parametrize("broken", [(), ("end",), ("end", "end_allocation")])
def test_a_recording_that_breaks_off_leaves_no_stream_and_no_allocation_open(monkeypatch, broken):
    driver, tries = Driver(monkeypatch, broken), []

    def compute():
        tries.append(1)
        if len(tries) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(2)

    with pytest.raises(torch.OutOfMemoryError):
        cuda_graph(compute)
    assert driver.streams == ["own"] and "end" in driver.calls
    assert ("end_allocation" in driver.calls) == bool(broken)


def test_a_recording_that_cuda_refuses_at_its_end_is_told(monkeypatch):
    driver = Driver(monkeypatch, ("end",))
    with pytest.raises(RuntimeError, match="end"):
        cuda_graph(lambda: torch.ones(2))
    assert driver.calls[-1] == "end_allocation" and driver.streams == ["own"]
