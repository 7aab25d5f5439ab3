"""The forward of one token, recorded once and replayed: a GPU does not wait for Python to launch each kernel.

A small batch's token is some thousand launches, which take Python longer than the GPU takes for what they do. A CUDA
graph launches all of them at once, but does the same to the same memory each time. So keys and values lie in buffers
that stay where they are, rows that have ended keep their place until half of them have or more, and what changes from
token to token is on the device: which tokens, their positions, and the column that they are written to.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policy.generation import cache as caches
from policy.generation.rows import LiveRows
from policy.model import DecodeStep, PolicyModel
from rlhf.core.moving import noted_waits

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes a function that computes on fixed memory, gives one that does it again, into the memory of the same result."""

COLUMNS = 64
"""Buffers have a multiple of so many columns."""
GROWTH = 256
"""Columns by which buffers grow at least: each time, the forward is recorded anew."""
SPARE = 0.5
"""Share of the bytes of the weights that keys and values of ended rows may have: reading them costs less than a new
recording, which takes as long as a hundred tokens."""


def cuda_graph(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A :data:`Record` of what ``compute`` launches on the current GPU.

    What waits for the GPU is found before anything is recorded: a recording that breaks off leaves a mess behind.

    Raises:
        RuntimeError: if it waits for the GPU, as where it asks for a number; nothing else has changed then.
    """
    stream, here = _stream(torch.cuda.current_device()), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream), noted_waits() as waits:
        compute()  # what libraries do at a first call must not be recorded either
    if waits:
        raise RuntimeError(f"it waits for the GPU at {waits[0]}")
    here.wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # memory of a recording is its own: none that is kept for others
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may bring batches meanwhile
        try:
            found = compute()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                _end(graph, pool)
            raise
        _end(graph, pool)

    def again() -> Tensor:
        graph.replay()
        return found

    return again


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all recordings: libraries keep memory for each stream that they have seen."""
    return torch.cuda.Stream(device)


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a recording; where CUDA says that it broke off, torch's allocator has not been told, and goes on as in it."""
    try:
        graph.capture_end()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            torch.cuda.memory._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


def can_be_recorded(policy: PolicyModel, live: LiveRows) -> bool:
    """Whether all layers of a policy keep all columns, and are told by a mask which of them to see."""
    name = str(policy.hf.config._attn_implementation)
    return name.endswith("sdpa") and caches.is_roomy(live.cache) and _kinds(policy) <= {FULL, SLIDING}


FULL, SLIDING = "full_attention", "sliding_attention"


def _kinds(policy: PolicyModel) -> set[str]:
    """The kinds of attention of its layers, by the names that Transformers has for them."""
    settings = policy.hf.config.get_text_config(decoder=True)
    kinds = getattr(settings, "layer_types", None)
    return {*kinds} if kinds else {FULL if getattr(settings, "sliding_window", None) is None else SLIDING}


def _window(policy: PolicyModel) -> int | None:
    """How many columns its layers with a sliding window see, if there are such."""
    return policy.hf.config.get_text_config(decoder=True).sliding_window if SLIDING in _kinds(policy) else None


class RecordedForwards:
    """Forwards of single tokens of rows in one cache after the other.

    Args:
        policy: whole on this rank. Its weights stay where they are for as long as this object is used.
        record: how to record.
        most_rows: that are written together.
        most_columns: of a prompt and its response.
    """

    def __init__(self, policy: PolicyModel, record: Record, most_rows: int, most_columns: int) -> None:
        self._policy, self._record = policy, record
        self._most_rows, self._most_columns = most_rows, most_columns
        self._spare = SPARE * sum(weight.nbytes for weight in policy.parameters())
        self._recording: Recording | None = None

    def recording(self, live: LiveRows, *, more: bool) -> "Recording":
        """One for the next token of these rows: the last one, or a new one.

        Args:
            live: rows for which :func:`can_be_recorded`.
            more: whether other rows wait for the places of these.
        """
        rows = self._most_rows if more else min(self._most_rows, 1 << (len(live) - 1).bit_length())
        if self._recording is None or not self._recording.holds(live, rows, self._spare):
            self._recording = None  # its memory comes first
            self._recording = self._new(live, rows)
        return self._recording

    def forget(self) -> None:
        """Give the memory of the recording back."""
        self._recording = None

    def _new(self, live: LiveRows, rows: int) -> "Recording":
        caches.settle(live.cache, len(live), live.columns)
        columns = min(live.columns + max(GROWTH, live.columns // 2), max(self._most_columns, live.columns + 1))
        caches.reserve(live.cache, rows, -(-columns // COLUMNS) * COLUMNS)
        return Recording(self._policy, self._record, live)


class Recording:
    """A forward over the buffers of a cache."""

    def __init__(self, policy: PolicyModel, record: Record, live: LiveRows) -> None:
        self._policy, self._cache = policy, live.cache
        self._buffers = caches.roomy_layers(live.cache)[0].buffers
        assert self._buffers is not None
        rows, _, self._columns, _ = self._buffers[0].shape
        device = live.tokens.device
        self._tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._end = torch.zeros(1, dtype=torch.long, device=device)
        self._all_columns = torch.arange(self._columns, device=device)
        self._kinds, self._window = _kinds(policy), _window(policy)
        self._count, self._past_window = 0, False
        self._place(live)
        self._again = record(self._compute)

    def holds(self, live: LiveRows, rows: int, spare: float) -> bool:
        """Whether these rows are in its buffers, with room for another token, and fill more than half of them, or leave
        no more than ``spare`` bytes of them unused."""
        there, layers = len(self._tokens), caches.roomy_layers(live.cache)
        if layers[0].buffers is not self._buffers or live.columns >= self._columns or rows > there:
            return False
        row = sum(part[0].nbytes for layer in layers for part in layer.buffers or ())
        return there // 2 < rows or (there - rows) * row <= spare

    def is_unproved(self, live: LiveRows) -> bool:
        """Whether the next forward is one of those that tell what a recording got wrong.

        They are its first two, as what Python counted is right in the first one, and the first that a window is too
        narrow for.
        """
        return self._count < 2 or self._is_past_window(live) > self._past_window

    def logits(self, live: LiveRows) -> Tensor:
        """The ``(B, V)`` logits behind the last tokens of B rows, which are in the cache from then on."""
        self._count, self._past_window = self._count + 1, self._is_past_window(live)
        self._place(live)
        return self._again()[: len(live)]

    def _is_past_window(self, live: LiveRows) -> bool:
        return self._window is not None and live.columns >= self._window

    def _place(self, live: LiveRows) -> None:
        self._tokens[: len(live), 0] = live.tokens
        self._positions[: len(live), 0] = live.positions
        self._end.fill_(live.columns)

    def _compute(self) -> Tensor:
        """``(R, V)`` logits. Rows that have ended see something, too: a row without any key has no logits."""
        step = DecodeStep(self._tokens, self._masks(), self._positions, self._cache)
        with caches.as_buffers(self._cache, self._end):
            return self._policy(decode=step)

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """``(R, 1, 1, C)`` of what the rows see, for all layers, or for each kind of layer."""
        columns = self._all_columns
        seen = (columns >= self._end - self._positions) & (columns <= self._end)
        masks = {FULL: seen[:, None, None]}
        if self._window is not None:
            masks[SLIDING] = (seen & (columns > self._end - self._window))[:, None, None]
        return masks if len(self._kinds) > 1 else masks[next(iter(self._kinds))]
