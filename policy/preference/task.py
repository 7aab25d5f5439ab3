"""What the optimizer loop asks of the preference stage: micro-batches, their loss, and held-out metrics."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.model import PolicyOutput
from policy.preference.columns import SIDES, RowSums, View, gathered_columns, implicit_rewards, row_sums, view
from policy.preference.config import PreferenceConfig
from policy.preference.losses import LOSSES
from policy.preference.modifiers import wpo_weights
from policy.preference.reference import LiveReference, Reference
from policy.preference.schedules import DeltaSchedule
from policy.preference.statistics import BatchStatistics
from policy.preference.telemetry import HeldOut, StepRows, held_out_evaluation, start_of, step_metrics
from policy.preference.watch import Watch
from reward.labels import Labels
from reward.margin_log import MarginLog
from reward.margin_maker import MarginMaker
from reward.pairs import Pairs, concatenate, detached_pairs, gather_pairs
from reward.telemetry import margin_telemetry
from rlhf.data.batching import Batch, ItemSource
from rlhf.data.preferences import PreferenceDataset
from rlhf.engine.api import Engine
from rlhf.train.batches import BatchMaker, without_gradient
from rlhf.train.loop import Portioned
from rlhf.train.packing import packs


class PreferenceTask:
    """The preference stage's task; see :class:`rlhf.train.loop.Task`.

    A micro-step runs: ask policy and reference about the rows; gather what the objectives want of the whole batch,
    detached; take the loss of this rank's own pairs. With statistics over the global batch the gathering
    happens once per step, in a first pass without gradient.
    """

    def __init__(
        self,
        engine: Engine,
        config: PreferenceConfig,
        train: ItemSource,
        held_out: ItemSource,
        references: tuple[Reference | None, Reference | None],
        total_steps: int,
    ) -> None:
        """``references`` are of the training and of the held-out items; ``None`` for objectives without one."""
        self._engine, self._config = engine, config
        self._train, self._held_out = train, held_out
        self._reference, self._held_out_reference = references
        self._batches = BatchMaker(engine.ranks, config.train, apart=config.loss.objective.unpaired)
        self._terms = [(term, LOSSES[term.kind], BatchStatistics(term)) for term in config.loss.terms]
        self._gathers = config.looks_at_pairs or any(statistics.names for _, _, statistics in self._terms)
        self._margins = MarginMaker(config.margins, total_steps)
        self._weights = MarginMaker(config.weights, total_steps)
        self._labels = Labels(config.labels, train.wrong if isinstance(train, PreferenceDataset) else np.empty(0))
        self._delta = _delta_schedule(config, total_steps)
        self._watch = Watch(config.watch, engine.ranks)
        self._rows = StepRows(engine.ranks)
        self._margin_log = MarginLog(config.output, engine.ranks, total_steps)
        self._step = 0
        self._start_logprobs: dict[str, float] | None = None
        self.evaluation: HeldOut | None = None
        """The latest held-out evaluation; ``None`` before the first, and without held-out data."""
        self.held_out: dict[str, Tensor] = {}
        """Columns of all items, of that evaluation."""

    # The training step

    def micro_batches(self, step: int) -> list[Batch]:
        self._step = step
        every = self._config.reference.sync_every
        if every and step and step % every == 0:
            assert isinstance(self._reference, LiveReference)
            self._reference.follow(self._engine, self._config.reference.sync_share)
        batches = self._batches.step(self._train, step)
        self._rows.clear()
        self._margins.start_step(step)
        self._weights.start_step(step)
        if self._delta is not None:
            self._delta.start_step(step)
        if self._config.over_all_pairs:
            found = without_gradient(self._engine, batches, **self._wanted())
            self._look([(batch, self._view(row_sums(output, batch), batch), output) for batch, output in found])
        return batches

    def loss(self, batch: Batch) -> Tensor:
        config = self._config.loss
        sums, output = self._ask(batch)
        view = self._view(sums, batch)
        if self._gathers and not self._config.over_all_pairs:
            self._look([(batch, view, output)])
        weights = self._wpo_weights(view.columns | view.plain, output, batch) if config.wpo else None
        losses = self._labels.losses(
            lambda opposite: self._losses(view.opposite if opposite else view, batch, weights), batch.indices
        )
        if self._config.weights.kind != "none":
            losses = losses * self._weights.of(batch.positions)
        self._rows.add(batch, view, losses)
        # Filler rows keep the graph of this forward alive on ranks that have no pair.
        return losses.sum() / self._batches.items + 0.0 * sum(part.sum() for part in output.logprobs)

    def _losses(self, view: View, batch: Batch, weights: Tensor | None) -> Tensor:
        """``(B,)`` losses of the labels of ``view``; ``weights`` are of the objectives, not of the likelihood."""
        config, columns = self._config.loss, view.columns
        losses = torch.zeros(len(batch), device=view.sums.head.device)
        for term, objective, statistics in self._terms:
            read = columns | view.plain if objective.likelihood == "alone" else columns
            inputs: dict[str, Any] = {name: read[name] for name in objective.inputs}
            inputs |= term.values | statistics.arguments(batch.positions)
            if objective.takes_margins and self._config.makes_margins:
                inputs["margins"] = self._margins.of(batch.positions)
            if self._delta is not None and "delta" in objective.parameters:
                inputs["delta"] = self._delta.value
            losses = losses + term.weight * objective(**inputs)
        if weights is not None:
            losses = losses * weights
        if config.nll_weight:
            losses = losses - config.nll_weight * view.plain["chosen_logprobs"] / columns["chosen_lengths"]
        return losses

    def step_metrics(self) -> dict[str, float]:
        seen = self._rows.gathered()
        metrics = step_metrics(seen, self._config.loss, self._start_logprobs)
        if self._start_logprobs is None:
            self._start_logprobs = start_of(metrics)
        if self._delta is not None:
            metrics["delta"] = self._delta.value
            self._delta.end_step(seen["chosen_logratios"] - seen["rejected_logratios"])
        if self._config.makes_margins:
            metrics |= self._margin_metrics(seen)
        metrics |= self._weights.transport_metrics()
        metrics |= self._batches.metrics(packs=packs(self._engine))
        self._watch.look(self._step + 1, metrics)
        return metrics

    def _margin_metrics(self, seen: dict[str, Tensor]) -> dict[str, float]:
        chosen, rejected = (implicit_rewards(seen, self._config.loss, side) for side in SIDES)
        if not bool(torch.isfinite(chosen - rejected).all()):
            return {}
        margins = self._margins.of(torch.arange(len(chosen), device=chosen.device))
        if self._margin_log.wants(self._step + 1):
            self._margin_log.write(self._step + 1, {"margin": margins, "gap": chosen - rejected})
        return margin_telemetry(margins, chosen, rejected) | self._margins.transport_metrics()

    def row_ids(self, batch: Batch) -> tuple[str, ...]:
        return batch.row_ids

    def state_dict(self) -> dict[str, Any]:
        return {
            "margins": self._margins.state_dict(),
            "weights": self._weights.state_dict(),
            "statistics": [statistics.state_dict() for _, _, statistics in self._terms],
            "delta": None if self._delta is None else self._delta.state_dict(),
            "watch": self._watch.state_dict(),
            "start_logprobs": self._start_logprobs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._margins.load_state_dict(state["margins"], self._engine.ranks.device)
        self._weights.load_state_dict(state["weights"], self._engine.ranks.device)
        for (_, _, statistics), saved in zip(self._terms, state["statistics"], strict=True):
            statistics.load_state_dict(saved)
        if self._delta is not None:
            self._delta.load_state_dict(state["delta"])
        self._watch.load_state_dict(state["watch"])
        self._start_logprobs = state["start_logprobs"]

    @property
    def portions(self) -> Mapping[str, Portioned]:
        if isinstance(self._reference, LiveReference) and self._reference.moves:
            return {"reference": self._reference}
        return {}

    def _wanted(self) -> dict[str, bool]:
        loss = self._config.loss
        return {"with_square_sums": loss.wpo, "with_embeddings": self._config.looks_at_pairs}

    def _ask(self, batch: Batch) -> tuple[RowSums, PolicyOutput]:
        """What the policy says of the rows of ``batch``; of the output, what has a gradient.

        The mismatched rows of kto, which only its KL reads, are asked without one.
        """
        if not self._config.loss.objective.unpaired:
            output = self._engine.forward(batch.buckets, **self._wanted())
            return row_sums(output, batch), output
        answers, mismatched = batch.parts
        ((_, constant),) = without_gradient(self._engine, [mismatched])
        output = self._engine.forward(answers.buckets)
        parts = row_sums(output, answers), row_sums(constant, mismatched)
        heads, tails = (torch.cat([getattr(part, name) for part in parts]) for name in ("head", "tail"))
        return RowSums(heads, tails), output

    def _view(self, sums: RowSums, batch: Batch) -> View:
        reference = None if self._reference is None else self._reference.of(batch)
        return view(sums, reference, batch, self._config.loss)

    def _look(self, seen: list[tuple[Batch, View, PolicyOutput]]) -> None:
        """Statistics, margins and weights from the pairs of all ranks."""
        ranks = self._engine.ranks
        mine = torch.cat([batch.positions for batch, _, _ in seen])
        columns, positions = gathered_columns([view for _, view, _ in seen], mine, ranks)
        for _, _, statistics in self._terms:
            statistics.update(columns, positions, self._batches.items)
        if self._config.looks_at_pairs:
            pairs = gather_pairs(concatenate([self._reward_pairs(*each) for each in seen]), ranks)
            self._margins.make(pairs, self._batches.items)
            self._weights.make(pairs, self._batches.items)

    def _reward_pairs(self, batch: Batch, view: View, output: PolicyOutput) -> Pairs:
        """Implicit rewards and mean response states in the place of rewards and pooled embeddings."""
        chosen, rejected = (implicit_rewards(view.columns, self._config.loss, side) for side in SIDES)
        assert output.embeddings is not None
        return detached_pairs(batch, chosen, rejected, output.embeddings)

    def _wpo_weights(self, columns: dict[str, Tensor], output: PolicyOutput, batch: Batch) -> Tensor:
        assert output.square_sums is not None
        squares = batch.sides(torch.cat([part.sum(dim=1) for part in output.square_sums]))
        inputs = {f"{side}_square_sums": values for side, values in zip(SIDES, squares, strict=True)}
        names = ("chosen_logprobs", "chosen_lengths", "rejected_logprobs", "rejected_lengths")
        largest = self._config.loss.wpo_max
        return wpo_weights(**inputs, **{name: columns[name].detach() for name in names}, largest=largest)

    # Held-out evaluation

    def evaluate(self) -> dict[str, float]:
        self.evaluation = None
        if not len(self._held_out):
            return {}
        seen = StepRows(self._engine.ranks)
        for start, batches in self._batches.chunks(self._held_out, np.arange(len(self._held_out))):
            for batch, output in without_gradient(self._engine, batches):
                reference = None if self._held_out_reference is None else self._held_out_reference.of(batch)
                seen.add(batch, view(row_sums(output, batch), reference, batch, self._config.loss), offset=start)
        self.held_out = seen.gathered()
        self.evaluation, metrics = held_out_evaluation(self.held_out, self._held_out, self._config.loss)
        return metrics


def _delta_schedule(config: PreferenceConfig, total_steps: int) -> DeltaSchedule | None:
    for term in config.loss.terms:
        if "delta" in term.values:
            return DeltaSchedule(config.loss.delta, term.values["delta"], term.values["beta"], total_steps)
    return None
