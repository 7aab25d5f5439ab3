"""What the optimizer loop asks of the reward stage: micro-batches, their loss, and held-out metrics."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward.config import RewardConfig
from reward.evaluate import Evaluation, evaluate_held_out
from reward.heads import draws_of_heads
from reward.labels import Labels
from reward.margin_log import MarginLog
from reward.margin_maker import MarginMaker
from reward.margins import cosines
from reward.model import Scores
from reward.pairs import Pairs, concatenate, detached_pairs, gather_pairs
from reward.statistics import StepStatistics
from reward.tables import LOSSES
from reward.telemetry import margin_telemetry
from rlhf.core.errors import TrainingStopped
from rlhf.data.batching import Batch
from rlhf.data.preferences import PreferenceDataset
from rlhf.engine.api import Engine
from rlhf.train.batches import BatchMaker, without_gradient
from rlhf.train.loop import Portioned
from rlhf.train.packing import packs


class RewardTask:
    """The reward stage's task; see :class:`rlhf.train.loop.Task`.

    A micro-step runs: score the rows; gather rewards and embeddings of all ranks, detached; make margins and
    batch statistics from all of them; take the loss of this rank's own pairs. With scope = global_batch the
    gathering happens once per step, in a first pass without gradient.
    """

    def __init__(
        self,
        engine: Engine,
        config: RewardConfig,
        train: PreferenceDataset,
        held_out: PreferenceDataset,
        total_steps: int,
    ) -> None:
        self._engine, self._config = engine, config
        self._batches = BatchMaker(engine.ranks, config.train)
        self._train, self._held_out = train, held_out
        self._loss = LOSSES[config.loss.kind]
        self._margins = MarginMaker(config.margin, total_steps)
        self._weights = MarginMaker(config.weights, total_steps)
        self._weighted = config.weights.kind != "none"
        self._statistics = StepStatistics(self._loss)
        self._parameters = config.loss.values
        self._labels = Labels(config.labels, train.wrong)
        self._global = config.over_all_pairs
        self._margin_log = MarginLog(config.output, engine.ranks, total_steps)
        self._seen: list[tuple[Pairs, Tensor]] = []
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self._step = 0
        self.evaluation: Evaluation | None = None
        """The latest held-out evaluation; ``None`` before the first, and without held-out data."""
        self.held_out_rewards = np.zeros((0, 2))
        """``(N, 2)`` of chosen and rejected, of that evaluation."""
        self.margin_statistics: dict[str, float] = {}
        """Telemetry of the margins of the latest step whose rewards were finite."""

    # The training step

    def micro_batches(self, step: int) -> list[Batch]:
        batches = self._batches.step(self._train, step)
        self._step = step + 1
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._engine.ranks.device)
        self._seen = []
        self._margins.start_step(step)
        self._weights.start_step(step)
        if self._global:
            ranks = self._engine.ranks
            seen = [_pairs(scores, batch) for batch, scores in without_gradient(self._engine, batches)]
            self._observe(concatenate([gather_pairs(pairs, ranks) for pairs in seen]))
        return batches

    def loss(self, batch: Batch) -> Tensor:
        scores = self._engine.forward(batch.buckets)
        if not self._global:
            self._observe(gather_pairs(_pairs(scores, batch), self._engine.ranks))
        inputs: dict[str, Any] = self._statistics.arguments(batch.positions)
        if self._loss.takes_margins:
            inputs["margins"] = self._margins.of(batch.positions)
        if scores.logprobs is not None:
            both = zip(("chosen_logprobs", "rejected_logprobs"), batch.sides(scores.logprobs), strict=True)
            inputs |= {name: values for name, values in both if name in self._loss.inputs}
        options = inputs | self._parameters
        losses = self._of_heads(batch, scores, options)
        if self._weighted:
            losses = losses * self._weights.of(batch.positions)
        if scores.divergences is not None:
            losses = losses + self._config.model.kl_weight * self._divergences(batch, scores.divergences)
        self._loss_sum = self._loss_sum + losses.detach().sum()
        # Filler rows keep the graph of this forward alive on ranks that have no pair.
        return losses.sum() / self._batches.items + 0.0 * scores.rewards.sum()

    def _of_heads(self, batch: Batch, scores: Scores, options: dict[str, Any]) -> Tensor:
        """``(B,)`` losses; of several heads, the mean over them, each with its own draw of the pairs."""

        def of(rewards: Tensor) -> Tensor:
            sides = batch.sides(rewards)
            return self._labels.losses(
                lambda opposite: self._loss(*(reversed(sides) if opposite else sides), **options), batch.indices
            )

        if scores.each is None:
            return of(scores.rewards)
        heads = scores.each.shape[1]
        draws = draws_of_heads(heads, batch.indices, self._config.train.seed).to(scores.each)
        losses = torch.stack([of(rewards) for rewards in scores.each.unbind(dim=1)], dim=1)
        return (draws * losses).mean(dim=1)

    def _divergences(self, batch: Batch, divergences: Tensor) -> Tensor:
        """``(B,)``: those of the factors of both answers, and each pair's share of that of the dictionary."""
        local, dictionary = divergences.unbind(dim=1)
        chosen, rejected = batch.sides(local)
        return chosen + rejected + batch.sides(dictionary)[0] / len(self._train)

    def step_metrics(self) -> dict[str, float]:
        pairs = concatenate([seen for seen, _ in self._seen])
        order = torch.cat([seen.positions for seen, _ in self._seen]).argsort()
        margins = torch.cat([values for _, values in self._seen])[order]
        likeness = cosines(pairs.chosen_embeddings, pairs.rejected_embeddings)
        loss = self._engine.ranks.sum(self._loss_sum).expand(len(pairs))
        columns = (pairs.chosen_rewards, pairs.rejected_rewards, margins, likeness, loss)
        # The one time in a step that the host waits for what was computed; from here on, all is on the host.
        chosen, rejected, margins, likeness, loss = torch.stack([each.double() for each in columns]).cpu()
        chosen, rejected = chosen.float(), rejected.float()
        gap = chosen - rejected
        metrics = {
            "loss": float(loss[0]) / len(pairs),
            "pairs": float(len(pairs)),
            **self._batches.metrics(packs=packs(self._engine)),
            "accuracy": float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean()),
            "gap": float(gap.mean()),
            "reward/chosen": float(chosen.mean()),
            "reward/rejected": float(rejected.mean()),
        }
        if not torch.isfinite(gap).all():
            return metrics
        telemetry = margin_telemetry(margins, chosen, rejected, cosines=likeness)
        telemetry = self._margins.transport_metrics() | self._weights.transport_metrics() | telemetry
        if self._config.margin.kind != "none" and self._margin_log.wants(self._step):
            self._margin_log.write(self._step, {"margin": margins, "gap": gap, "similarity": likeness})
        self.margin_statistics = {name: value for name, value in telemetry.items() if math.isfinite(value)}
        return metrics | telemetry

    def row_ids(self, batch: Batch) -> tuple[str, ...]:
        return batch.row_ids

    def state_dict(self) -> dict[str, Any]:
        return {
            "margins": self._margins.state_dict(),
            "weights": self._weights.state_dict(),
            "statistics": self._statistics.state_dict(),
            "margin_statistics": self.margin_statistics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._margins.load_state_dict(state["margins"], self._engine.ranks.device)
        self._weights.load_state_dict(state["weights"], self._engine.ranks.device)
        self._statistics.load_state_dict(state["statistics"])
        self.margin_statistics = state["margin_statistics"]

    @property
    def portions(self) -> Mapping[str, Portioned]:
        return {}

    def _observe(self, pairs: Pairs) -> None:
        """Margins, weights and statistics from the pairs of all ranks."""
        self._seen.append((pairs, self._margins.make(pairs, self._batches.items)))
        self._weights.make(pairs, self._batches.items)
        self._statistics.update(pairs, self._batches.items)

    # Held-out evaluation

    def evaluate(self) -> dict[str, float]:
        self.evaluation = self._evaluation() if len(self._held_out) else None
        return {} if self.evaluation is None else _evaluation_metrics(self.evaluation)

    def _evaluation(self) -> Evaluation:
        """Every rank must call it."""
        data, ranks = self._held_out, self._engine.ranks
        parts = []
        for start, batches in self._batches.chunks(data, np.arange(len(data))):
            for batch, scores in without_gradient(self._engine, batches):
                found = gather_pairs(_pairs(scores, batch), ranks)
                parts.append((found.positions + start, found.chosen_rewards, found.rejected_rewards))
        positions, chosen, rejected = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        order = positions.argsort()
        rewards = torch.stack([chosen[order], rejected[order]], dim=1)
        bad = (~torch.isfinite(rewards).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise TrainingStopped(
                f"held-out rewards are not finite for {len(bad)} of {len(rewards)} pairs, such as "
                f"{data.item(bad[0]).row_id}: the weights have run away. Go on from an earlier checkpoint with a lower "
                "optim.learning_rate, or with engine.precision=bfloat16 instead of float16"
            )
        self.held_out_rewards = rewards.double().numpy()
        chosen, rejected = rewards.unbind(dim=1)
        return evaluate_held_out(chosen.numpy(), rejected.numpy(), lengths=data.lengths, scores=data.scores)


def _pairs(scores: Scores, batch: Batch) -> Pairs:
    chosen, rejected = batch.sides(scores.rewards)
    return detached_pairs(batch, chosen, rejected, scores.embeddings)


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {
        "eval/accuracy": evaluation.accuracy.value,
        "eval/loss": evaluation.mean_loss,
        "eval/calibration_error": evaluation.calibration_error,
        "eval/gap": evaluation.mean_gap,
        "eval/reward_mean": evaluation.reward_mean,
        "eval/reward_sd": evaluation.reward_sd,
    }
