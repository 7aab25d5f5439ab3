"""Tripwires of the preference stage: a symptom, the likely cause, the setting to change."""

import logging

from policy.preference.config import WatchConfig
from rlhf.core.errors import TrainingStopped
from rlhf.engine.ranks import Ranks

DECAY = 0.8  # a single odd batch is no symptom

log = logging.getLogger(__name__)


class Watch:
    """Looks at smoothed metrics; says each thing once, or stops all ranks together."""

    def __init__(self, config: WatchConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._smooth: dict[str, float] = {}
        self._said: set[str] = set()

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics must be equal on all ranks.

        Raises:
            TrainingStopped: if a symptom shows and ``action`` is stop.
        """
        if self._config.action == "none":
            return
        drift = self._smoothed("logprobs/chosen_drift_per_token", metrics)
        if drift < -self._config.chosen_drop:
            self._speak(
                "chosen",
                f"step {step}: chosen responses have become less likely, by {-drift:.2f} nats per token since the "
                f"start (watch.chosen_drop = {self._config.chosen_drop}). The objective pushes rejected ones down "
                "and takes the chosen ones along. Set loss.nll_weight=0.1 or more, take loss.kind=apo_zero or "
                "apo_hinge_zero, or lower optim.learning_rate",
            )
        resting = self._smoothed("zero_gradient_share", metrics)
        if resting > self._config.zero_gradient_share:
            self._speak(
                "resting",
                f"step {step}: {resting:.0%} of the pairs have no gradient any more (watch.zero_gradient_share = "
                f"{self._config.zero_gradient_share}): they are told apart by more than the objective asks for. "
                "Stop here, or raise the margin (loss.parameters.margin) or lower delta (loss.parameters.delta)",
            )

    def state_dict(self) -> dict:
        return {"smooth": dict(self._smooth), "said": sorted(self._said)}

    def load_state_dict(self, state: dict) -> None:
        self._smooth, self._said = dict(state["smooth"]), set(state["said"])

    def _smoothed(self, name: str, metrics: dict[str, float]) -> float:
        value = metrics.get(name)
        if value is None or value != value:
            return self._smooth.get(name, 0.0)
        self._smooth[name] = DECAY * self._smooth.get(name, value) + (1 - DECAY) * value
        return self._smooth[name]

    def _speak(self, symptom: str, text: str) -> None:
        if self._config.action == "stop":
            raise TrainingStopped(text + "; checkpoints are intact")
        if symptom not in self._said and self._ranks.is_main:
            log.warning("%s", text)
        self._said.add(symptom)
