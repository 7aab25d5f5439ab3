"""Tripwires of the preference stage: a symptom, the likely cause, the setting to change."""

from policy.preference.config import WatchConfig
from policy.tripwires import Tripwires
from rlhf.engine.ranks import Ranks


class Watch:
    """Looks at smoothed metrics; says each thing once, or stops all ranks together."""

    def __init__(self, config: WatchConfig, ranks: Ranks) -> None:
        self._config = config
        self._wires = Tripwires(config.action, ranks)
        self.state_dict, self.load_state_dict = self._wires.state_dict, self._wires.load_state_dict

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics must be equal on all ranks.

        Raises:
            TrainingStopped: if a symptom shows and ``action`` is stop.
        """
        drift = self._wires.smoothed("logprobs/chosen_drift_per_token", metrics)
        if drift < -self._config.chosen_drop:
            self._wires.speak(
                "chosen",
                f"step {step}: chosen responses have become less likely, by {-drift:.2f} nats per token since the "
                f"start (watch.chosen_drop = {self._config.chosen_drop}). The objective pushes rejected ones down "
                "and takes the chosen ones along. Set loss.nll_weight=0.1 or more, take loss.kind=apo_zero or "
                "apo_hinge_zero, or lower optim.learning_rate",
            )
        resting = self._wires.smoothed("zero_gradient_share", metrics)
        if resting > self._config.zero_gradient_share:
            self._wires.speak(
                "resting",
                f"step {step}: {resting:.0%} of the pairs have no gradient any more (watch.zero_gradient_share = "
                f"{self._config.zero_gradient_share}): they are told apart by more than the objective asks for. "
                "Stop here, or raise the margin (loss.parameters.margin) or lower delta (loss.parameters.delta)",
            )
