"""What every sampler gives, and how the randomness of a response is made."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Response:
    """What a policy wrote after one prompt."""

    tokens: NDArray[np.int64]
    """``(T,)``, T >= 1, the end token included if it was drawn."""
    logprobs: NDArray[np.float32]
    """``(T,)`` in nats, of the drawn tokens under log softmax(logits / temperature), before top_k and top_p."""
    entropies: NDArray[np.float32]
    """``(T,)`` in nats, of the distributions that ``logprobs`` are of."""
    ended: bool
    """Whether an end token or a stop string ended the response, not the limit."""


class Sampler(Protocol):
    """Draws responses from a policy."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        advance: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """One response to each prompt, in the order of the prompts.

        A response is a function of its prompt, its seed and the weights, up to rounding: not of what else is
        sampled, on how many ranks, or in which order.

        Args:
            prompts: ``(P,)`` token ids each, P >= 1; a prompt may come several times, with different seeds.
            seeds: one for each prompt, 0 <= seed < 2^64; see :func:`row_seed`.
            advance: told after each batch how many responses this rank has.
        """


def row_seed(*parts: int | str) -> int:
    """A seed for one response from what tells it apart (run seed, step, prompt, sample ...): 0 <= seed < 2^64."""
    text = ",".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def row_uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """``(count,)`` uniform numbers in [0, 1), the same on every machine; a longer sequence begins with a shorter."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def sampler_tolerance(dtype: torch.dtype) -> float:
    """Nats that a token's log-probabilities by two ways through a model of ``dtype`` may be apart for rounding."""
    return {torch.bfloat16: 0.5, torch.float16: 0.2}.get(dtype, 1e-3)
