"""Makes one margin or weight per pair as a section of the recipe says, with warm-up, queue and telemetry."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reward.config import MarginConfig, WeightConfig
from reward.margins import OptimalTransportMargins
from reward.pairs import Pairs
from reward.telemetry import margin_telemetry
from reward.weights import TransportWeights
from rlhf.core.moving import moved

FROM_MODEL = {"chosen_rewards", "rejected_rewards", "chosen_embeddings", "rejected_embeddings"}
COUNT_ONLY = ("none", "constant")
"""Kinds of margins that ask how many pairs there are and nothing else."""
HOST_CELLS = 128 * 128
"""Plans with so many cells, at most, are made on the host for pairs on a GPU: a plan of 64 pairs is some five hundred
kernels and fifty waits there (11 ms on an H100, as for 1024 pairs), and one wait here."""


class MarginMaker:
    """Makes the margins, or weights, of a step from the pairs of all ranks, and looks them up by position."""

    def __init__(self, config: MarginConfig | WeightConfig, total_steps: int) -> None:
        self._config = config
        self._row = config.row
        self._parameters = {name: config.values[name] for name in self._row.hyperparameters}
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
        neutral = self._config.neutral
        margins = neutral + self._scale * (self._raw_margins(pairs) - neutral)
        margins = moved(margins, pairs.positions.device)
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
        for name in filter(lambda name: name.endswith("/residual"), means):
            means[name] = max(metrics[name] for _, metrics in self._transport)
        return dict(means)

    def state_dict(self) -> dict[str, Any]:
        return {"queue": None if self._queue is None else [part.cpu() for part in self._queue]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        queue = state["queue"]
        self._queue = None if queue is None else (queue[0].to(device), queue[1].to(device))

    def _raw_margins(self, pairs: Pairs) -> Tensor:
        values = {name: getattr(pairs, name) for name in self._row.inputs}
        read = values.keys() & FROM_MODEL if self._config.kind not in COUNT_ONLY else ()
        if read and len(pairs) * (len(pairs) + self._config.queue_pairs) <= HOST_CELLS:
            values = _on_host(values)
        finite = [torch.isfinite(values[name]).all() for name in read]
        if finite and not bool(torch.stack(finite).all()):
            # The loss of such a pair is not finite either, so the step is about to be dropped on all ranks.
            return torch.full_like(pairs.chosen_rewards, self._config.neutral)
        own = dict(values)
        if self._queue is not None:
            for name, before in zip(("rejected_embeddings", "rejected_rewards"), self._queue, strict=True):
                values[name] = torch.cat([values[name], before.to(values[name].device)])
        result = self._row.implementation(**values, **self._parameters)
        if isinstance(result, Tensor):
            return result
        self._transport.append((len(pairs), _plan_metrics(result, own)))
        self._push(own["rejected_embeddings"], result.rejected_rewards[: len(pairs)])
        return result.per_pair

    def _push(self, embeddings: Tensor, rewards: Tensor) -> None:
        """First in, first out; rewards as they entered the cost, so that centering is not done twice."""
        limit = self._config.queue_pairs
        if not limit:
            return
        if self._queue is not None:
            before = (part.to(embeddings.device) for part in self._queue)  # made elsewhere, or read from a checkpoint
            embeddings, rewards = map(torch.cat, zip(before, (embeddings, rewards), strict=True))
        self._queue = embeddings[-limit:], rewards[-limit:]


def _on_host(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of them on the host, which waits once for the device that they are on."""
    if all(value.device.type == "cpu" for value in values.values()):
        return values
    return _copied(values)


def _copied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, by way of one tensor of a type that holds them all."""
    wide = torch.float64 if torch.float64 in {value.dtype for value in values.values()} else torch.float32
    together = torch.cat([value.detach().flatten().to(wide) for value in values.values()]).cpu()
    parts = together.split([value.numel() for value in values.values()])
    return {
        name: part.view(value.shape).to(value.dtype) for (name, value), part in zip(values.items(), parts, strict=True)
    }


def _plan_metrics(result: OptimalTransportMargins | TransportWeights, pairs: Mapping[str, Tensor]) -> dict[str, float]:
    if isinstance(result, TransportWeights):
        weights = result.weights
        return {
            "weight/lowest": float(weights.min()),
            "weight/sd": float(weights.std(correction=0)),
            "weight/residual": result.residual,
        }
    rewards = pairs["chosen_rewards"], pairs["rejected_rewards"]
    everything = margin_telemetry(result.margins, *rewards, transport=result)
    of_the_plan = ("margin/reward_term", "margin/semantic_term", "margin/transport", "margin/residual", "margin/conv")
    return {name: value for name, value in everything.items() if name.startswith(of_the_plan)}
