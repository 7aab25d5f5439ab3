"""What the optimizer loop asks of supervised fine-tuning: micro-batches, their loss, and held-out metrics."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.sft.config import SftConfig
from policy.sft.evaluation import SftEvaluation, evaluate_responses
from rlhf.core.errors import TrainingStopped
from rlhf.data.batching import Batch, ItemSource
from rlhf.engine.api import Engine
from rlhf.train.batches import BatchMaker, without_gradient
from rlhf.train.loop import Portioned
from rlhf.train.packing import packs


class SftTask:
    """The SFT stage's task; see :class:`rlhf.train.loop.Task`.

    The loss of a step is the mean over the response tokens of its global batch: a long response weighs more than a
    short one, and how rows are spread over ranks and micro-batches does not matter.
    """

    def __init__(self, engine: Engine, config: SftConfig, train: ItemSource, held_out: ItemSource) -> None:
        self._engine = engine
        self._train, self._held_out = train, held_out
        self._batches = BatchMaker(engine.ranks, config.train)
        self._nll = 0.0  # of this rank in this step
        self._response_tokens = 0  # of all ranks in this step
        self.evaluation: SftEvaluation | None = None
        """The latest held-out evaluation; ``None`` before the first, and without held-out data."""
        self.held_out_sums = np.zeros(0), np.zeros(0)
        """``(N,)`` negative log-likelihood and number of response tokens of every conversation, of that evaluation."""

    # The training step

    def micro_batches(self, step: int) -> list[Batch]:
        batches = self._batches.step(self._train, step)
        ranks = self._engine.ranks
        mine = torch.zeros((), dtype=torch.long, device=ranks.device)
        for batch in batches:
            mine += _response_counts(batch).sum()
        self._response_tokens = int(ranks.sum(mine))
        self._nll = 0.0
        return batches

    def loss(self, batch: Batch) -> Tensor:
        output = self._engine.forward(batch.buckets)
        # Filler rows add 0 and keep the graph of this forward alive on ranks that have no conversation.
        nll = -sum(part.sum() for part in output.logprobs)
        self._nll += float(nll.detach())
        return nll / max(self._response_tokens, 1)

    def step_metrics(self) -> dict[str, float]:
        ranks = self._engine.ranks
        nll = ranks.sum(torch.tensor(self._nll, dtype=torch.float64, device=ranks.device))
        loss = nll / max(self._response_tokens, 1)
        return {
            "loss": float(loss),
            "perplexity": float(loss.exp()),
            "conversations": float(self._batches.items),
            "response_tokens": float(self._response_tokens),
            **self._batches.metrics(packs=packs(self._engine)),
        }

    def row_ids(self, batch: Batch) -> tuple[str, ...]:
        return batch.row_ids

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is carried from step to step."""

    @property
    def portions(self) -> Mapping[str, Portioned]:
        return {}

    # Held-out evaluation

    def evaluate(self) -> dict[str, float]:
        """Every rank must call it."""
        self.evaluation = None
        if not len(self._held_out):
            return {}
        nll, tokens = self._held_out_sums()
        bad = np.flatnonzero(~np.isfinite(nll))
        if len(bad):
            raise TrainingStopped(
                f"the held-out loss is not finite for {len(bad)} conversations, such as "
                f"{self._held_out.item(int(bad[0])).row_id}: the policy has broken down. Lower optim.learning_rate, "
                "or publish an earlier checkpoint"
            )
        self.held_out_sums = nll, tokens
        self.evaluation = evaluate_responses(nll, tokens)
        return {"eval/loss": self.evaluation.loss, "eval/perplexity": self.evaluation.perplexity}

    def _held_out_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """``(N,)`` negative log-likelihood and number of response tokens of every held-out conversation."""
        rows = []
        for start, batches in self._batches.chunks(self._held_out, np.arange(len(self._held_out))):
            for batch, output in without_gradient(self._engine, batches):
                (nll,) = batch.sides(-torch.cat([part.sum(dim=1) for part in output.logprobs]))
                (tokens,) = batch.sides(_response_counts(batch))
                columns = (batch.positions + start, nll, tokens)
                rows.append(torch.stack([column.double() for column in columns], dim=1))
        found = self._engine.ranks.gather_rows(torch.cat(rows))
        _, nll, tokens = found[found[:, 0].argsort()].cpu().numpy().T
        return nll, tokens


def _response_counts(batch: Batch) -> Tensor:
    """``(R,)`` response tokens of the rows of all buckets. Nothing predicts the first token of a row."""
    return torch.cat([bucket.response_mask[:, 1:].sum(dim=1) for bucket in batch.buckets])
