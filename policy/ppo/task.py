"""What a PPO step is, and what is measured on held-out prompts."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from policy.generation.api import Sampler
from policy.generation.vllm.training import VllmTrainingSampler
from policy.model import PolicyOutput
from policy.ppo.config import PpoConfig
from policy.ppo.ema import MovingAverage
from policy.ppo.estimators import ESTIMATORS
from policy.ppo.experience import (
    Measured,
    compared_responses,
    experience_metrics,
    groups_that_differ,
    make_experience,
    not_finite,
)
from policy.ppo.kl import AdaptiveKl, FixedKl, horizon_of
from policy.ppo.reference import ReferenceModel
from policy.ppo.replay import Replay
from policy.ppo.reports import HeldOut, RolloutLog, held_out, held_out_rows
from policy.ppo.rollouts import Rollouts, ask, by_response, joined, roll_out, rollout_share
from policy.ppo.scoring import Scored, Scorer, joined_scores
from policy.ppo.update import Updater, UpdateReport
from policy.ppo.watch import Watch
from rlhf.core.errors import TrainingStopped
from rlhf.data.batching import ItemSource, global_batch
from rlhf.data.prompts import Prompt, PromptData, PromptDataset
from rlhf.data.templates import ChatFormat
from rlhf.engine.api import Engine
from rlhf.engine.build import precision_of
from rlhf.engine.ranks import Ranks
from rlhf.train.batches import BatchMaker
from rlhf.train.loop import Outcome, Portioned
from rlhf.train.metrics import SkipLog
from rlhf.train.progress import Progress

PROBED_SHARE = 16
"""Where the sampler's log-probabilities are believed, one response in so many is measured all the same."""


@dataclass(frozen=True)
class Engines:
    """Policy and critic, saved and loaded together; see :class:`rlhf.train.loop.Stateful`."""

    policy: Engine
    critic: Engine | None

    @property
    def ranks(self) -> Ranks:
        return self.policy.ranks

    @property
    def by_name(self) -> dict[str, Engine]:
        found = {"policy": self.policy, "critic": self.critic}
        return {name: engine for name, engine in found.items() if engine is not None}

    def save(self, folder: Path) -> None:
        for name, engine in self.by_name.items():
            # Any rank may be the first to get here, and engines expect their folder.
            (folder / name).mkdir(parents=True, exist_ok=True)
            engine.save(folder / name)

    def load(self, folder: Path) -> None:
        for name, engine in self.by_name.items():
            engine.load(folder / name)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The models of a run, each behind what is asked of it."""

    engines: Engines
    sampler: Sampler
    reference: ReferenceModel
    scorer: Scorer
    second: Scorer | None
    """The scorer that only the tripwires look at; ``None`` without one."""


class PpoTask:
    """The steps of a run, its held-out evaluation, its state. See :class:`rlhf.train.loop.Watched`."""

    def __init__(
        self,
        config: PpoConfig,
        roles: Roles,
        data: PromptData,
        chat: ChatFormat,
        replay: Replay,
        steps: int,
        pretraining: ItemSource | None = None,
    ) -> None:
        """``steps`` of the run."""
        self._config, self._roles, self._data, self._chat, self._replay = config, roles, data, chat, replay
        self._policy, self._critic = roles.engines.policy, roles.engines.critic
        self._ranks = self._policy.ranks
        self._maker = BatchMaker(self._ranks, config.train)
        self._updater = Updater(self._policy, self._critic, config, pretraining)
        self._kl = _kl_controller(config, steps)
        self._ema = MovingAverage(self._policy, config.ema) if config.ema else None
        self._watch = Watch(config.watch, self._ranks)
        rollout = config.rollout
        told = rollout.backend == "hf" and config.loss.importance == "none"
        self._sampler_is_believed = rollout.logprobs == "sampler" or (
            rollout.logprobs == "auto" and told and precision_of(config.engine) == "float32"
        )
        self._engines = roles.sampler if isinstance(roles.sampler, VllmTrainingSampler) else None
        self._steps = steps
        self._skips = SkipLog(config.output, self._ranks)
        self._log = RolloutLog(config.output, self._ranks, config.rollout.written)
        self._steps_taken = 0
        self._saved = 0  # steps that a checkpoint holds
        self.evaluation: HeldOut | None = None
        """The latest held-out evaluation; ``None`` before the first, and without held-out prompts."""
        self.held_out_rows: list[dict[str, Any]] = []
        """The responses of that evaluation, for ``held_out.jsonl``."""

    # The step

    def step(self, step: int, progress: Progress) -> Outcome:
        """One PPO step; every rank must call it."""
        clock = _Clock()
        self._steps_taken = step + 1
        # 1. Sample prompts; 2. generate responses; 3. score them.
        rollouts, scored, sampling = self._sample_and_score(step, clock, progress)
        self._write_ahead(step + 1, clock)
        with clock("score"):
            second = None if self._roles.second is None else self._roles.second.score(rollouts)
        # 4. Log-probabilities of policy and reference; 5. values.
        progress.phase(f"step {step + 1}: log-probabilities and values")
        with clock("measure"):
            measured = self._measure(rollouts)
        faults = not_finite(rollouts, scored, measured)
        if faults:
            self._updater.count(step)
            return self._skip(step, rollouts, scored, faults)
        # 6. KL and rewards per token; 7. advantages and returns.
        coefficient = self._kl.coefficient
        experience = make_experience(rollouts, scored, measured, self._config, coefficient)
        # 8. Minibatch epochs of policy and critic.
        progress.phase(f"step {step + 1}: updates")
        with clock("update"):
            report = self._updater.run(step, experience, coefficient)
            self._updater.count(step)
        if self._ema is not None:
            self._ema.update()
        # 9. Adapt the KL coefficient; 10. log, and look for trouble.
        metrics = experience_metrics(experience)
        self._kl.update(metrics["kl"], len(rollouts))
        metrics |= report.metrics() | {"kl_coefficient": coefficient, "rollouts": float(len(rollouts))}
        metrics |= {"tokens": float(rollouts.lengths.sum())} | sampling | self._of_engines(rollouts) | clock.metrics()
        if second is not None and bool(second.known.any()):
            seen = second.raw[second.known]
            metrics |= {"second": float(seen.mean()), "second_deviation": float(seen.std(correction=0))}
        self._log.write(step + 1, experience, second)
        self._watch.look(step + 1, metrics)
        return self._outcome(step, metrics, report)

    def _sample_and_score(
        self, step: int, clock: "_Clock", progress: Progress
    ) -> tuple[Rollouts, Scored, dict[str, float]]:
        """Responses to the prompts of a step, with their scores and what the log says of these prompts.

        With rounds to spare, other prompts take the places of those whose responses all have one score.
        """
        first = self._places(step)
        rollouts, scored = self._round(step, 0, first, clock, progress)
        if not ESTIMATORS[self._config.advantage.estimator].needs_groups:
            return rollouts, scored, {}
        differ, seen, number = self._differ(rollouts, scored), first, 0
        while int(differ.sum()) < len(first) and number < self._config.rollout.extra_rounds:
            others = self._other_places(step, number + 1, seen)
            if not len(others):
                break
            number, seen = number + 1, np.concatenate([seen, others])
            found, of_found = self._round(step, number, others, clock, progress)
            rollouts, scored = joined([rollouts, found]), joined_scores([scored, of_found])
            differ = self._differ(rollouts, scored)
        metrics = {"flat_prompts_share": 1 - float(differ.float().mean()), "extra_rounds": float(number)}
        if number:  # those that differ first, and of both kinds the earlier ones
            kept = torch.argsort((~differ).long(), stable=True)[: len(first)].sort().values
            rollouts, places = rollouts.of_groups(kept.tolist())
            scored = scored.at(places)
        return rollouts, scored, metrics

    def _differ(self, rollouts: Rollouts, scored: Scored) -> Tensor:
        """``(G,)`` bool: the prompts from whose responses something can be learned."""
        compared = compared_responses(rollouts, scored.known, self._config.reward)
        return groups_that_differ(scored.scores, compared, rollouts.groups)

    def _round(
        self, step: int, number: int, places: NDArray[np.int64], clock: "_Clock", progress: Progress
    ) -> tuple[Rollouts, Scored]:
        """Responses to these prompts, or those that a killed run has left, and their scores."""
        prompts = [self._data.train.prompt(int(place)) for place in places]
        with clock("generate"):
            rollouts = self._replay.get(step, number, prompts)
            if rollouts is None:
                seed = ("train", step) if number == 0 else ("train", step, "round", number)
                rollouts = self._roll_out(prompts, self._config.rollout.samples, seed, progress)
                self._replay.put(step, number, rollouts, oldest=self._saved)
        progress.phase(f"step {step + 1}: scoring {len(rollouts)} responses")
        with clock("score"):
            return rollouts, self._roles.scorer.score(rollouts)

    def _other_places(self, step: int, number: int, seen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Training prompts that a step has not ``seen``: as many as it has, or all that are left."""
        left = np.setdiff1d(np.arange(len(self._data.train)), seen)
        mixed = np.random.default_rng([self._config.train.seed, step, number]).permutation(left)
        return mixed[: self._config.rollout.prompts]

    def _write_ahead(self, step: int, clock: "_Clock") -> None:
        """Let engines begin with the responses of ``step``, by the weights as they are now."""
        if self._engines is None or not self._config.rollout.ahead or step >= self._steps:
            return
        prompts = [self._data.train.prompt(int(place)) for place in self._places(step)]
        seeds = (self._config.train.seed, "train", step)
        with clock("generate"):
            self._engines.begin(*rollout_share(self._ranks, prompts, self._config.rollout.samples, seeds))

    def _of_engines(self, rollouts: Rollouts) -> dict[str, float]:
        """What the log says of the engines of vLLM.

        Raises:
            TrainingStopped: if weights changed that nobody trains.
        """
        if self._engines is None:
            return {}
        metrics = {"rollout/staleness": float(rollouts.staleness)} | self._engines.metrics()
        if self._config.optim.learning_rate == 0 and metrics["rollout/pushes"] > 1:
            raise TrainingStopped(
                f"optim.learning_rate = 0, and yet weights went to vLLM {metrics['rollout/pushes']:.0f} times, as they "
                "had changed: what changes them is a fault"
            )
        return metrics

    def _places(self, step: int) -> NDArray[np.int64]:
        train = self._data.train
        return global_batch(
            step,
            items=len(train),
            batch_size=self._config.rollout.prompts,
            seed=self._config.train.seed,
            last=self._config.train.last_batch,
        )

    def _roll_out(
        self, prompts: Sequence[Prompt], samples: int, seed: Sequence[int | str], progress: Progress | None = None
    ) -> Rollouts:
        total = len(prompts) * samples

        def advance(count: int) -> None:
            if progress is not None:  # each rank has its share
                progress.phase(f"writing responses: about {min(count * self._ranks.world_size, total)} of {total}")

        seeds = (self._config.train.seed, *seed)
        found = roll_out(self._roles.sampler, self._ranks, self._chat.tokenizer, prompts, samples, seeds, advance)
        return found if self._engines is None else replace(found, staleness=self._engines.staleness)

    def _measure(self, rollouts: Rollouts) -> Measured:
        logprobs, entropies, gaps = self._of_policy(rollouts)
        values = None
        if self._critic is not None:
            values = ask(self._critic, self._maker, rollouts, by_response, rollouts.mask.shape[1])
        return Measured(
            logprobs=logprobs,
            entropies=entropies,
            reference=self._roles.reference.logprobs(
                self._maker, rollouts, temperature=self._config.rollout.temperature
            ),
            values=values,
            sampler_gaps=gaps,
        )

    def _of_policy(self, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
        """``(N, W)`` log-probabilities and entropies of the policy that wrote the responses, and ``(n,)`` nats by which
        the sampler is off the training engine. Where the sampler is believed, a few responses tell these."""
        width, rows = rollouts.mask.shape[1], np.arange(len(rollouts))
        if self._sampler_is_believed:
            rows = np.unique(np.linspace(0, len(rows) - 1, 1 + len(rows) // PROBED_SHARE).astype(int))

        def both(output: PolicyOutput, batch: Any) -> Tensor:
            assert output.entropies is not None
            parts = by_response(output.logprobs, batch), by_response(output.entropies, batch)
            return torch.cat([functional.pad(part, (0, width - part.shape[1])) for part in parts], dim=1)

        temperature = self._config.rollout.temperature
        seen = ask(
            self._policy,
            self._maker,
            rollouts,
            both,
            2 * width,
            rows=rows,
            with_entropies=True,
            temperature=temperature,
        )
        logprobs, entropies = seen[:, :width], seen[:, width:]
        gaps = (rollouts.sampler_logprobs[rows] - logprobs)[rollouts.mask[rows]]
        if self._sampler_is_believed:
            logprobs, entropies = rollouts.sampler_logprobs, rollouts.sampler_entropies
        return logprobs, entropies, gaps

    def _skip(self, step: int, rollouts: Rollouts, scored: Scored, faults: dict[str, list[str]]) -> Outcome:
        """Every rank has the same columns, so every rank comes here together."""
        rows = list(dict.fromkeys(row for found in faults.values() for row in found))
        self._skips.record(step + 1, rows if self._ranks.is_main else [], [], what=" and ".join(faults))
        self._log.write_skipped(step + 1, rollouts, scored, rows)
        return Outcome(metrics={"rollouts": float(len(rollouts))}, applied=False)

    def _outcome(self, step: int, metrics: dict[str, float], report: UpdateReport) -> Outcome:
        if report.skipped:
            self._skips.record(step + 1, report.skipped if self._ranks.is_main else [], [])
        applied = all(info.applied for info in report.infos.values()) and not report.skipped
        return Outcome(metrics=metrics, applied=applied, scaler_overflow=report.overflow, end=self._watch.tripped)

    # Held-out evaluation

    def evaluate(self) -> dict[str, float]:
        """Rewards of fresh responses to held-out prompts, from the same seeds each time; every rank must call it.

        Judged is what would be published: the moving average, where there is one.
        """
        self.evaluation = None
        if not len(self._data.evals):
            return {}
        with contextlib.nullcontext() if self._ema is None else self._ema.in_engine():
            return self._evaluate()

    def _evaluate(self) -> dict[str, float]:
        rollouts = self._roll_out(_all_prompts(self._data.evals), 1, ("held-out",))
        scored = self._roles.scorer.score(rollouts)
        second = None if self._roles.second is None else self._roles.second.score(rollouts)
        for each in (scored, second):
            _check_held_out(rollouts, each)
        temperature, width = self._config.rollout.temperature, rollouts.mask.shape[1]
        if self._sampler_is_believed:
            logprobs = rollouts.sampler_logprobs
        else:
            logprobs = ask(
                self._policy,
                self._maker,
                rollouts,
                lambda output, batch: by_response(output.logprobs, batch),
                width,
                temperature=temperature,
            )
        reference = self._roles.reference.logprobs(self._maker, rollouts, temperature=temperature)
        self.evaluation = held_out(
            rollouts, scored, second, logprobs, reference, kl_budget=self._config.watch.kl_budget
        )
        self.held_out_rows = held_out_rows(
            rollouts, scored, second, (logprobs - reference).sum(dim=1), self._data.evals.prompt_keys
        )
        return self.evaluation.metrics()

    def sample(self, count: int) -> Rollouts:
        """A few responses, for publishing; every rank must call it."""
        source = self._data.evals if len(self._data.evals) else self._data.train
        places = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
        return self._roll_out([source.prompt(int(place)) for place in places], 1, ("publish",))

    def take_average(self) -> None:
        """Put the moving average, if there is one, into the policy: to be published, no longer trained."""
        if self._ema is not None:
            self._ema.put_into_engine()

    # State

    def state_dict(self) -> dict[str, Any]:
        self._saved = self._steps_taken
        return {
            "kl": self._kl.state_dict(),
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kl.load_state_dict(state["kl"])
        self._watch.load_state_dict(state["watch"])

    @property
    def portions(self) -> Mapping[str, Portioned]:
        return {} if self._ema is None else {"average": self._ema}


class _Clock:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}_seconds": seconds for phase, seconds in self._seconds.items()}


def _kl_controller(config: PpoConfig, steps: int) -> FixedKl | AdaptiveKl:
    kl = config.kl
    if kl.controller == "fixed":
        return FixedKl(kl.coefficient)
    return AdaptiveKl(kl.coefficient, kl.target, kl.horizon or horizon_of(steps, config.rollouts))


def _check_held_out(rollouts: Rollouts, scored: Scored | None) -> None:
    """Refuse held-out scores that are not finite, or not there.

    Raises:
        TrainingStopped: if a score is not finite: it would be the best there is for ever; or if there is none.
    """
    if scored is not None and not bool(scored.known.any()):
        raise TrainingStopped(
            f"the reward function has no score for any of the {len(rollouts)} responses to held-out prompts: it "
            "returned None or failed on each. Earlier checkpoints are intact"
        )
    bad = [] if scored is None else (~torch.isfinite(scored.scores)).nonzero().flatten().tolist()
    if bad:
        raise TrainingStopped(
            f"the score is not finite for {len(bad)} of {len(rollouts)} responses to held-out prompts, such as "
            f"{rollouts.row_ids[bad[0]]}. Look at the reward function or model; earlier checkpoints are intact"
        )


def _all_prompts(data: PromptDataset) -> list[Prompt]:
    return [data.prompt(index) for index in range(len(data))]
