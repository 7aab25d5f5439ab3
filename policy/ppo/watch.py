"""Tripwires of PPO: a symptom, the likely cause, the setting to change."""

from policy.ppo.config import WatchConfig
from policy.tripwires import Tripwires
from rlhf.engine.ranks import Ranks


class Watch:
    """Looks at the metrics of each step. They must be equal on all ranks."""

    def __init__(self, config: WatchConfig, ranks: Ranks) -> None:
        self._config = config
        self._wires = Tripwires(config.action, ranks)
        self._start: dict[str, float] = {}
        self._peak_second: tuple[float, float] | None = None  # of the second scorer, and the reward then

    @property
    def tripped(self) -> bool:
        """End the run and take the best checkpoint."""
        return self._wires.tripped

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Compare with the budget and with the start of the run.

        Raises:
            TrainingStopped: if a symptom shows and ``action`` is stop.
        """
        for name in ("tokens_per_response", "ended_share", "second_deviation"):
            if name in metrics:
                self._start.setdefault(name, metrics[name])
        smooth = {name: self._wires.smoothed(name, metrics) for name in metrics}
        self._look_at_sampler(step, smooth)
        self._look_at_kl(step, smooth)
        self._look_at_responses(step, smooth)
        self._look_at_scores(step, smooth)

    def _look_at_sampler(self, step: int, smooth: dict[str, float]) -> None:
        gap, limit = smooth.get("sampler_gap/mean", 0.0), self._config.sampler_gap
        if gap > limit:
            self._wires.speak(
                "sampler",
                f"step {step}: the sampler's log-probabilities are {gap:.3g} nats a token off those of training "
                f"(watch.sampler_gap = {limit}): responses come from another policy than the one that is trained. Set "
                "policy.attention=eager, engine.precision=float32 or, under ZeRO-3, rollout.gather=never, and report "
                "the model; where responses come from vLLM, loss.importance=token corrects for it",
            )

    def _look_at_kl(self, step: int, smooth: dict[str, float]) -> None:
        budget = self._config.kl_budget
        if smooth["kl"] > budget:
            self._wires.speak(
                "kl",
                f"step {step}: the policy is {smooth['kl']:.1f} nats per response from the reference "
                f"(watch.kl_budget = {budget}): it has left the texts that the reward model knows. Raise "
                "kl.coefficient, set kl.controller=adaptive, or lower optim.learning_rate",
            )

    def _look_at_responses(self, step: int, smooth: dict[str, float]) -> None:
        config, start = self._config, self._start
        length, first = smooth["tokens_per_response"], start["tokens_per_response"]
        if not first / config.length_factor <= length <= first * config.length_factor:
            self._wires.speak(
                "length",
                f"step {step}: responses have {length:.0f} tokens, at the start {first:.0f} (watch.length_factor = "
                f"{config.length_factor}). The reward pays for length, not for content: set reward.length_penalty, "
                "reward.missing_end_penalty=1, or raise kl.coefficient",
            )
        ended = smooth["ended_share"]
        if ended < start["ended_share"] - config.ended_drop:
            self._wires.speak(
                "ended",
                f"step {step}: {ended:.0%} of the responses end by themselves, at the start {start['ended_share']:.0%} "
                f"(watch.ended_drop = {config.ended_drop}). Set reward.missing_end_penalty=1 or raise "
                "rollout.max_new_tokens",
            )
        if smooth["repetition"] > config.repetition:
            self._wires.speak(
                "repetition",
                f"step {step}: {smooth['repetition']:.0%} of the 4-grams of a response repeat earlier ones "
                f"(watch.repetition = {config.repetition}): the policy loops because the reward allows it. Raise "
                "kl.coefficient, add loss.entropy=0.01, or train the reward model on such texts",
            )

    def _look_at_scores(self, step: int, smooth: dict[str, float]) -> None:
        config = self._config
        if smooth["score_deviation"] < config.min_deviation:
            self._wires.speak(
                "variance",
                f"step {step}: scores have a standard deviation of {smooth['score_deviation']:.2g} "
                f"(watch.min_deviation = {config.min_deviation}): nothing tells responses apart. Raise "
                "rollout.temperature or kl.coefficient, and read rollouts.jsonl: it shows what the reward model scores",
            )
        if abs(smooth["length_correlation"]) > config.length_correlation:
            self._wires.speak(
                "correlation",
                f"step {step}: score and response length correlate by {smooth['length_correlation']:.2f} "
                f"(watch.length_correlation = {config.length_correlation}): the policy learns length. Set "
                "reward.length_penalty, or train the reward model on pairs of like length",
            )
        if "second" in smooth:
            self._look_at_second(step, smooth)

    def _look_at_second(self, step: int, smooth: dict[str, float]) -> None:
        second, reward = smooth["second"], smooth["score"]
        if self._peak_second is None or second > self._peak_second[0]:
            self._peak_second = second, reward
        peak, reward_then = self._peak_second
        limit = self._config.second_drop * self._start["second_deviation"]
        if peak - second > limit and reward > reward_then:
            self._wires.speak(
                "second",
                f"step {step}: the second scorer has fallen from {peak:.3f} to {second:.3f} while the reward rose "
                f"from {reward_then:.3f} to {reward:.3f} (watch.second_drop = {self._config.second_drop}): the policy "
                "exploits the reward model. Take an earlier checkpoint, raise kl.coefficient, or use an ensemble with "
                "reward.combine=min",
            )

    def state_dict(self) -> dict:
        return {"wires": self._wires.state_dict(), "start": self._start, "peak": self._peak_second}

    def load_state_dict(self, state: dict) -> None:
        self._wires.load_state_dict(state["wires"])
        self._start = dict(state["start"])
        self._peak_second = None if state["peak"] is None else tuple(state["peak"])
