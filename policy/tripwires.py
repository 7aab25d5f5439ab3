"""What the stages' watches share: smoothed metrics, and saying each symptom once."""

import logging

from rlhf.core.errors import TrainingStopped
from rlhf.engine.ranks import Ranks

DECAY = 0.8  # a single odd batch is no symptom

log = logging.getLogger(__name__)


class Tripwires:
    """Remembers smoothed metrics and what has been said. Metrics must be equal on all ranks.

    Attributes:
        tripped: a symptom has shown and the action is "best".
    """

    def __init__(self, action: str, ranks: Ranks) -> None:
        """``action``: warn once for each symptom, stop with an error, best (end the run), or none."""
        self._action, self._ranks = action, ranks
        self._smooth: dict[str, float] = {}
        self._said: set[str] = set()
        self.tripped = False

    def smoothed(self, name: str, metrics: dict[str, float]) -> float:
        """The metric over the last few steps; the last known one (or 0) where it is absent or NaN."""
        value = metrics.get(name)
        if value is None or value != value:
            return self._smooth.get(name, 0.0)
        self._smooth[name] = DECAY * self._smooth.get(name, value) + (1 - DECAY) * value
        return self._smooth[name]

    def speak(self, symptom: str, text: str) -> None:
        """Act on a symptom.

        Raises:
            TrainingStopped: if the action is stop.
        """
        if self._action == "none":
            return
        if self._action == "stop":
            raise TrainingStopped(text + "; checkpoints are intact")
        self.tripped |= self._action == "best"
        if symptom not in self._said and self._ranks.is_main:
            ending = "; ending the run and taking the best checkpoint" if self._action == "best" else ""
            log.warning("%s%s", text, ending)
        self._said.add(symptom)

    def state_dict(self) -> dict:
        return {"smooth": dict(self._smooth), "said": sorted(self._said)}

    def load_state_dict(self, state: dict) -> None:
        self._smooth, self._said = dict(state["smooth"]), set(state["said"])
