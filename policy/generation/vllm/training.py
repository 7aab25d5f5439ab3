"""The sampler of a policy whose responses come from vLLM, in training or not."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from policy.generation.api import Response
from policy.generation.options import SamplingConfig
from policy.generation.vllm.pool import Answer, EnginePool
from policy.generation.vllm.process import check_vllm
from policy.generation.vllm.sampler import Share, VllmSampler, draws_from_all, launch_of
from policy.generation.vllm.weights import WeightPush, write_config
from policy.model import policy_of
from rlhf.data.templates import ChatFormat
from rlhf.engine.api import Engine
from rlhf.engine.frozen import Frozen


class Engines:
    """The engines of a run, and what brings the weights of a model to them. Every rank must call each method.

    Args:
        model: the policy, in training or not.
        chat: its format.
        config: how to sample; engines are started with the first weights that are pushed.
        folder: for logs and, unless the recipe names another one, weights on their way.
    """

    def __init__(self, model: Frozen, chat: ChatFormat, config: SamplingConfig, folder: Path) -> None:
        ranks, tokenizer, streams = model.ranks, folder / "tokenizer", config.vllm.transport != "folder"
        launch = launch_of(config, dtype=next(model.module.parameters()).dtype, folder=folder, tokenizer=tokenizer)

        def make_pool() -> EnginePool | None:
            if not ranks.is_main:
                return None
            chat.tokenizer.save_pretrained(str(tokenizer))
            if streams:
                write_config(policy_of(model), tokenizer)
            return EnginePool(launch)

        self.ranks, self._chat, self._config = ranks, chat, config
        self.pool = ranks.together(make_pool)
        """The engines, on the main rank; ``None`` on the others."""
        through = None if streams else Path(config.vllm.folder or folder / "weights")
        self.weights = WeightPush(model, self.pool, through)

    def sampler(
        self,
        config: SamplingConfig,
        *,
        eos_token_ids: Sequence[int] | None = None,
        repetition_penalty: float = 1.0,
        logprobs: bool = True,
    ) -> VllmSampler:
        """What asks these engines; see :class:`VllmSampler`."""
        return VllmSampler(
            self.ranks,
            self.pool,
            config,
            eos_token_ids=self._chat.end_token_ids if eos_token_ids is None else eos_token_ids,
            tokenizer=self._chat.tokenizer,
            repetition_penalty=repetition_penalty,
            logprobs=logprobs and draws_from_all(config) == draws_from_all(self._config),  # engines have one mode
            renew=self.weights.renew,
        )

    def close(self) -> None:
        """End the engines that were started here, and take away the weights on their way."""
        if self.pool is not None:
            self.pool.close()
        self.weights.clear()


@contextlib.contextmanager
def engines_of(model: Frozen, chat: ChatFormat, config: SamplingConfig, folder: Path) -> Iterator[Engines | None]:
    """Engines with the weights of a model that is not trained; ``None`` where the model itself is to be sampled from.

    Raises:
        ConfigError: if there is no vLLM.
    """
    if config.backend == "hf":
        yield None
        return
    model.ranks.on_main(lambda: check_vllm(config.vllm, "sampling"))
    with contextlib.closing(Engines(model, chat, config, folder)) as engines:
        engines.weights.push()
        yield engines


class VllmTrainingSampler:
    """A sampler of the weights as they are at each call, on engines that have them; see :class:`VllmSampler`."""

    def __init__(self, engine: Engine, chat: ChatFormat, config: SamplingConfig, folder: Path) -> None:
        """Every rank must call it; see :class:`Engines`."""
        self._ranks = engine.ranks
        self._engines = Engines(engine, chat, config, folder)
        self._sampler = self._engines.sampler(config)
        self.weights = self._engines.weights
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[list[Answer | None]] | None = None
        self._begun: Share | None = None
        self.staleness = 0
        """How many updates the responses of the latest call are behind."""

    @property
    def pool(self) -> EnginePool | None:
        """The engines, on the main rank."""
        return self._engines.pool

    def generate(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], advance: Callable[[int], None] | None = None
    ) -> list[Response]:
        """One response to each prompt; see :meth:`VllmSampler.generate`. Every rank must call it."""
        share = self._sampler.gather(prompts, seeds)
        begun, self._begun = self._begun, None
        self.staleness = int(begun is not None and begun.rows == share.rows)
        if self.staleness:
            return self._sampler.responses(share, self._ranks.on_main(lambda: self._answers_of(self._pending)))
        if begun is not None:  # of a step that is not asked for now; engines do one thing at a time
            self._ranks.on_main(lambda: self._answers_of(self._pending))
            self._begun = begun
        self.weights.push()
        return self._sampler.drawn(share, advance)

    def begin(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> None:
        """Let the engines begin with these responses by the weights as they are now. Every rank must call it.

        The next call that asks for the same gets them, whatever the weights are by then.
        """
        share = self._sampler.gather(prompts, seeds)
        if self._begun is not None:
            self._ranks.on_main(lambda: self._answers_of(self._pending))
        self.weights.push()
        self._begun = share

        def start() -> None:
            self._pending = self._thread.submit(self._sampler.ask, share)

        self._ranks.on_main(start)

    def metrics(self) -> dict[str, float]:
        """What the log says of the engines."""
        return {
            "rollout/version": float(self.weights.version),
            "rollout/pushes": float(self.weights.pushes),
            "rollout/engine_restarts": float(self._ranks.broadcast_object(self.pool.restarts if self.pool else 0)),
        }

    @staticmethod
    def _answers_of(pending: "Future[list[Answer | None]] | None") -> list[Answer | None]:
        assert pending is not None, "begin() was called"
        return pending.result()

    def close(self) -> None:
        """End the engines."""
        self._engines.close()
