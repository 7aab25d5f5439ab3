"""The model that KL is counted from."""

import contextlib

from torch import Tensor

from policy.model import policy_of
from policy.ppo.rollouts import Rollouts, ask, by_response
from rlhf.engine.frozen import Frozen
from rlhf.train.batches import BatchMaker


class ReferenceModel:
    """A second model; or the policy itself with its adapters off."""

    def __init__(self, model: Frozen, *, adapters_off: bool = False) -> None:
        self._model, self._adapters_off = model, adapters_off

    def logprobs(self, maker: BatchMaker, rollouts: Rollouts, *, temperature: float) -> Tensor:
        """``(N, W)`` on the CPU, the same on every rank. Every rank must call it."""
        off = policy_of(self._model).without_adapters() if self._adapters_off else contextlib.nullcontext()
        with off:
            return ask(
                self._model,
                maker,
                rollouts,
                lambda output, batch: by_response(output.logprobs, batch),
                rollouts.mask.shape[1],
                temperature=temperature,
            )
