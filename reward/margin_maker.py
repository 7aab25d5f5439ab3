"""From the recipe's margin section to one margin per pair, with warm-up, queue and telemetry."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from reward.config import MarginConfig
from reward.margins import OptimalTransportMargins, optimal_transport_margins, reward_margins, similarity_margins
from reward.pairs import Pairs
from reward.telemetry import margin_telemetry
from rlhf.core.errors import DataError


class MarginMaker:
    """Makes the margins of a step from the pairs of all ranks, and looks them up by position."""

    def __init__(self, config: MarginConfig, total_steps: int) -> None:
        self._config = config
        self._warmup_steps = round(config.warmup_share * total_steps)
        self._scale = config.scale
        self._table = torch.empty(0)
        self._queue: tuple[Tensor, Tensor] | None = None
        self._transport: list[tuple[int, dict[str, float]]] = []

    def start_step(self, step: int) -> None:
        """Set the scale of 0-based ``step`` and forget the margins of the step before."""
        ramp = min(1.0, (step + 1) / self._warmup_steps) if self._warmup_steps else 1.0
        self._scale = self._config.scale * ramp
        self._table = torch.empty(0)
        self._transport = []

    def make(self, pairs: Pairs, pairs_in_step: int) -> Tensor:
        """``(B,)`` margins of pairs from all ranks; kept for :meth:`of`."""
        margins = self._scale * self._raw_margins(pairs)
        if not len(self._table):
            self._table = margins.new_full((pairs_in_step,), torch.nan)
        self._table[pairs.positions] = margins
        return margins

    def of(self, positions: Tensor) -> Tensor:
        """``(B,)`` margins of this rank's pairs, by their place in the global batch."""
        return self._table[positions]

    def transport_metrics(self) -> dict[str, float]:
        """Telemetry of the step's transport problems: means weighted by their pairs, the worst residual."""
        total = sum(count for count, _ in self._transport)
        means: dict[str, float] = defaultdict(float)
        for count, metrics in self._transport:
            for name, value in metrics.items():
                means[name] += value * count / total
        if self._transport:
            means["margin/residual"] = max(metrics["margin/residual"] for _, metrics in self._transport)
        return dict(means)

    def state_dict(self) -> dict[str, Any]:
        return {"queue": None if self._queue is None else [part.cpu() for part in self._queue]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        queue = state["queue"]
        self._queue = None if queue is None else (queue[0].to(device), queue[1].to(device))

    def _raw_margins(self, pairs: Pairs) -> Tensor:
        config = self._config
        if config.kind == "none":
            return torch.zeros_like(pairs.chosen_rewards)
        if config.kind == "constant":
            return torch.full_like(pairs.chosen_rewards, config.constant)
        if config.kind == "column":
            return _column(pairs)
        if not _finite(pairs):
            # The loss of such a pair is not finite either, so the step is about to be dropped on all ranks.
            return torch.zeros_like(pairs.chosen_rewards)
        if config.kind == "similarity":
            return similarity_margins(
                pairs.chosen_embeddings, pairs.rejected_embeddings, semantic_weight=config.semantic_weight
            )
        if config.kind == "reward":
            return reward_margins(
                pairs.chosen_rewards,
                pairs.rejected_rewards,
                reward_weight=config.reward_weight,
                reward_cost=config.reward_cost,
            )
        return self._transport_margins(pairs)

    def _transport_margins(self, pairs: Pairs) -> Tensor:
        config = self._config
        embeddings, rewards = pairs.rejected_embeddings, pairs.rejected_rewards
        if self._queue is not None:
            embeddings, rewards = torch.cat([embeddings, self._queue[0]]), torch.cat([rewards, self._queue[1]])
        result = optimal_transport_margins(
            pairs.chosen_embeddings,
            embeddings,
            pairs.chosen_rewards,
            rewards,
            reward_weight=config.reward_weight,
            semantic_weight=config.semantic_weight,
            epsilon=config.epsilon,
            max_iterations=config.max_iterations,
            reward_cost=config.reward_cost,
            center_rewards=config.center_rewards,
            reading=config.reading,
        )
        self._transport.append((len(pairs), _plan_metrics(result, pairs)))
        self._push(pairs.rejected_embeddings, result.rejected_rewards[: len(pairs)])
        return result.margins

    def _push(self, embeddings: Tensor, rewards: Tensor) -> None:
        """First in, first out; rewards as they entered the cost, so that centering is not done twice."""
        limit = self._config.queue_pairs
        if not limit:
            return
        if self._queue is not None:
            embeddings, rewards = torch.cat([self._queue[0], embeddings]), torch.cat([self._queue[1], rewards])
        self._queue = embeddings[-limit:], rewards[-limit:]


def _column(pairs: Pairs) -> Tensor:
    if torch.isnan(pairs.data_margins).any():
        raise DataError(
            "margin.kind = column, but some training rows have neither a margin nor both scores; "
            "name the columns in data.columns.margin or data.columns.chosen_score and rejected_score"
        )
    return pairs.data_margins


def _finite(pairs: Pairs) -> bool:
    values = (pairs.chosen_rewards, pairs.rejected_rewards, pairs.chosen_embeddings, pairs.rejected_embeddings)
    return all(bool(torch.isfinite(value).all()) for value in values)


def _plan_metrics(result: OptimalTransportMargins, pairs: Pairs) -> dict[str, float]:
    everything = margin_telemetry(
        result.margins, pairs.chosen_rewards, pairs.rejected_rewards, transport=result
    )
    of_the_plan = ("margin/reward_term", "margin/semantic_term", "margin/transport", "margin/residual", "margin/conv")
    return {name: value for name, value in everything.items() if name.startswith(of_the_plan)}
