"""What the optimizer loop asks of the reward stage: micro-batches, their loss, and held-out metrics."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward.config import RewardConfig
from reward.evaluate import Evaluation, evaluate_pairs
from reward.losses import LOSSES
from reward.margin_maker import MarginMaker
from reward.model import Scores
from reward.pairs import Pairs, concatenate, gather_pairs
from reward.statistics import StepStatistics
from reward.telemetry import margin_telemetry
from rlhf.data.batching import (
    MicroBatchPlan,
    PreferenceBatch,
    collate,
    global_batch,
    groups_per_micro_step,
    plan_micro_batches,
)
from rlhf.data.preferences import PreferenceDataset
from rlhf.engine.api import Engine

EVALUATION_CHUNK = 512


class RewardTask:
    """See :class:`rlhf.train.loop.Task`.

    A micro-step runs: score the rows; gather rewards and embeddings of all ranks, detached; make margins and
    batch statistics from all of them; take the loss of this rank's own pairs. With margin.scope =
    global_batch the gathering happens once per step, in a first pass without gradient.
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
        self._train, self._held_out = train, held_out
        self._loss = LOSSES[config.loss.kind]
        self._margins = MarginMaker(config.margin, total_steps)
        self._statistics = StepStatistics(self._loss)
        self._global = config.margin.scope == "global_batch" and (
            config.margin.kind == "ot" or bool(self._loss.statistics)
        )
        self._pairs_in_step = 0
        self._seen: list[tuple[Pairs, Tensor]] = []
        self._sums: dict[str, float] = {}
        self.evaluation: Evaluation | None = None
        """The latest held-out evaluation; ``None`` before the first, and without held-out data."""

    # The training step

    def micro_batches(self, step: int) -> list[PreferenceBatch]:
        indices = global_batch(
            step,
            pairs=len(self._train),
            batch_pairs=self._config.train.global_batch_pairs,
            seed=self._config.train.seed,
        )
        self._pairs_in_step = len(indices)
        self._sums = defaultdict(float)
        self._seen = []
        self._margins.start_step(step)
        batches = self._collate_all(self._train, indices)
        if self._global:
            self._look_at_all(batches)
        return batches

    def loss(self, batch: PreferenceBatch) -> Tensor:
        scores = self._engine.forward(batch.groups)
        if not self._global:
            self._observe(gather_pairs(_detached_pairs(scores, batch), self._engine.ranks))
        own = batch.order.view(2, -1)
        chosen, rejected = scores.rewards[own[0]], scores.rewards[own[1]]
        inputs: dict[str, Any] = self._statistics.arguments(batch.positions)
        if self._loss.takes_margins:
            inputs["margins"] = self._margins.of(batch.positions)
        for side, name in zip(own, ("chosen_logprobs", "rejected_logprobs"), strict=True):
            if name in self._loss.inputs:
                inputs[name] = scores.logprobs[side]
        losses = self._loss(chosen, rejected, **inputs, **self._config.loss.parameters)
        self._sums["loss"] += float(losses.detach().sum())
        # Filler rows keep the graph of this forward alive on ranks that have no pair.
        return losses.sum() / self._pairs_in_step + 0.0 * scores.rewards.sum()

    def step_metrics(self) -> dict[str, float]:
        ranks = self._engine.ranks
        local = [self._sums["loss"], self._sums["tokens"], self._sums["padded_tokens"]]
        loss, tokens, padded = ranks.sum(torch.tensor(local, dtype=torch.float64, device=ranks.device)).tolist()
        pairs = concatenate([seen for seen, _ in self._seen])
        order = torch.cat([seen.positions for seen, _ in self._seen]).argsort()
        margins = torch.cat([values for _, values in self._seen])[order]
        gap = pairs.chosen_rewards - pairs.rejected_rewards
        metrics = {
            "loss": loss / len(pairs),
            "pairs": float(len(pairs)),
            "tokens": tokens,
            "padding_share": 1.0 - tokens / padded,
            "accuracy": float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean()),
            "gap": float(gap.mean()),
            "reward/chosen": float(pairs.chosen_rewards.mean()),
            "reward/rejected": float(pairs.rejected_rewards.mean()),
        }
        if not torch.isfinite(gap).all():
            return metrics
        telemetry = margin_telemetry(
            margins,
            pairs.chosen_rewards,
            pairs.rejected_rewards,
            chosen_embeddings=pairs.chosen_embeddings,
            rejected_embeddings=pairs.rejected_embeddings,
        )
        return metrics | self._margins.transport_metrics() | telemetry

    def row_ids(self, batch: PreferenceBatch) -> tuple[str, ...]:
        return batch.row_ids

    def state_dict(self) -> dict[str, Any]:
        return {"margins": self._margins.state_dict(), "statistics": self._statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._margins.load_state_dict(state["margins"], self._engine.ranks.device)
        self._statistics.load_state_dict(state["statistics"])

    def _observe(self, pairs: Pairs) -> None:
        """Margins and statistics from the pairs of all ranks."""
        self._seen.append((pairs, self._margins.make(pairs, self._pairs_in_step)))
        self._statistics.update(pairs, self._pairs_in_step)

    def _look_at_all(self, batches: list[PreferenceBatch]) -> None:
        ranks = self._engine.ranks
        self._observe(concatenate([gather_pairs(pairs, ranks) for pairs in self._scores_without_gradient(batches)]))

    def _scores_without_gradient(self, batches: Iterable[PreferenceBatch]) -> Iterable[Pairs]:
        """Score with dropout off; yields this rank's pairs, batch by batch."""
        module = self._engine.module
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    yield _detached_pairs(self._engine.forward(batch.groups), batch)
        finally:
            module.train(was_training)

    def _collate_all(self, data: PreferenceDataset, indices: np.ndarray) -> list[PreferenceBatch]:
        """This rank's micro-batches; fillers make their number and their forwards equal on all ranks."""
        train, ranks = self._config.train, self._engine.ranks
        plan = plan_micro_batches(
            data.lengths[indices],
            token_budget=train.micro_batch_tokens,
            ranks=ranks.world_size,
            row_groups=train.row_groups,
        )
        return [self._collate(data, indices, micro_step) for micro_step in plan]

    def _collate(self, data: PreferenceDataset, indices: np.ndarray, plans: list[MicroBatchPlan]) -> PreferenceBatch:
        ranks = self._engine.ranks
        plan = plans[ranks.rank]
        batch = collate(data, indices, plan, groups_per_micro_step(plans))
        self._sums["tokens"] += float(data.lengths[indices[list(plan.pairs)]].sum())
        self._sums["padded_tokens"] += plan.padded_tokens
        return batch.to(ranks.device)

    # Held-out evaluation

    def evaluate(self) -> dict[str, float]:
        self.evaluation = self._evaluation() if len(self._held_out) else None
        return {} if self.evaluation is None else _evaluation_metrics(self.evaluation)

    def _evaluation(self) -> Evaluation:
        """Every rank must call it."""
        kept = self._sums
        self._sums = defaultdict(float)
        data = self._held_out
        parts = []
        for start in range(0, len(data), EVALUATION_CHUNK):
            indices = np.arange(start, min(start + EVALUATION_CHUNK, len(data)))
            batches = self._collate_all(data, indices)
            for pairs in self._scores_without_gradient(batches):
                found = gather_pairs(pairs, self._engine.ranks)
                parts.append((found.positions + start, found.chosen_rewards, found.rejected_rewards))
        self._sums = kept
        positions, chosen, rejected = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        order = positions.argsort()
        scores = data.scores if not np.isnan(data.scores).any() else None
        return evaluate_pairs(
            chosen[order].numpy(),
            rejected[order].numpy(),
            chosen_lengths=data.lengths[:, 0],
            rejected_lengths=data.lengths[:, 1],
            chosen_scores=None if scores is None else scores[:, 0],
            rejected_scores=None if scores is None else scores[:, 1],
        )


def _detached_pairs(scores: Scores, batch: PreferenceBatch) -> Pairs:
    own = batch.order.view(2, -1)
    rewards, embeddings = scores.rewards.detach().float(), scores.embeddings.detach().float()
    margins = batch.margins if batch.margins is not None else batch.score_gaps
    return Pairs(
        positions=batch.positions,
        chosen_rewards=rewards[own[0]],
        rejected_rewards=rewards[own[1]],
        chosen_embeddings=embeddings[own[0]],
        rejected_embeddings=embeddings[own[1]],
        data_margins=torch.full_like(rewards[own[0]], torch.nan) if margins is None else margins,
    )


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {
        "eval/accuracy": evaluation.accuracy.value,
        "eval/loss": evaluation.mean_loss,
        "eval/calibration_error": evaluation.calibration_error,
        "eval/gap": evaluation.mean_gap,
        "eval/reward_mean": evaluation.reward_mean,
        "eval/reward_sd": evaluation.reward_sd,
    }
