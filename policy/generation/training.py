"""The sampler of a policy in training, whatever shards it."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from policy.generation.api import Response
from policy.generation.check import check_sampling
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.generation.weights import RolloutWeights
from policy.model import PolicyModel
from rlhf.data.templates import ChatFormat
from rlhf.engine.api import Engine


class TrainingSampler:
    """A sampler of the weights as they are at each call; see :class:`policy.generation.api.Sampler`."""

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        config: SamplingConfig,
        build: Callable[[], PolicyModel],
        gather: Literal["auto", "once", "never"],
        origin: str = "the policy",
    ) -> None:
        """Every rank must call it.

        Args:
            engine: the policy under training.
            chat: the format of the run.
            config: how to sample.
            build: makes a policy of the same shape; see :class:`RolloutWeights`.
            gather: whether to; see :class:`RolloutWeights`.
            origin: of the policy, for messages.
        """
        self._ranks = engine.ranks
        self._weights = RolloutWeights(engine, build, gather)
        check_sampling(self._weights.model, origin)
        self._sampler = HfSampler(
            self._weights.model,
            config,
            eos_token_ids=chat.end_token_ids,
            pad_token_id=chat.tokenizer.pad_token_id,
            tokenizer=chat.tokenizer,
            synced=self._weights.synced,
        )

    def generate(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], advance: Callable[[int], None] | None = None
    ) -> list[Response]:
        """One response to each prompt; see :meth:`policy.generation.api.Sampler.generate`. Every rank must call it."""
        with self._weights.fresh():
            if self._weights.synced:  # forwards of all ranks: one that fails by itself cannot tell the others
                return self._sampler.generate(prompts, seeds, advance)
            return self._ranks.together(lambda: self._sampler.generate(prompts, seeds, advance))
