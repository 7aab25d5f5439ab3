"""The minibatch epochs of a step: clipped updates of the policy and of the critic."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policy.model import PolicyOutput
from policy.ppo.config import PpoConfig
from policy.ppo.experience import Experience
from policy.ppo.losses import (
    bounded_tokens,
    clipped_share,
    clipped_surrogate,
    clipped_value_loss,
    kl_estimates,
    reduce_tokens,
    sequence_ratios,
    token_ratios,
    weighted_likelihood,
)
from policy.ppo.rollouts import by_response
from rlhf.core.epochs import steps_per_epoch
from rlhf.data.batching import Batch, ItemSource
from rlhf.engine.api import Engine, StepInfo
from rlhf.train.batches import BatchMaker


@dataclass
class UpdateReport:
    """What the updates of one step came to, over all ranks."""

    sums: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """Rows of minibatches that were dropped because a loss or gradient was not finite."""
    overflow: bool = False
    """What was dropped was a float16 overflow only."""
    stopped_early: bool = False
    infos: dict[str, StepInfo] = field(default_factory=dict)
    """The last optimizer step of each engine, and its largest gradient norm before clipping."""

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def metrics(self) -> dict[str, float]:
        """Means over tokens and minibatches."""
        sums = self.sums
        found = {"epochs_stopped_early": float(self.stopped_early), "minibatches": sums.get("minibatches", 0.0)}
        if sums.get("policy_tokens"):
            tokens = sums["policy_tokens"]
            found |= {
                "policy/loss": sums["policy_loss"] / sums["policy_updates"],
                "policy/clip_share": sums["clipped"] / tokens,
                "policy/approximate_kl": sums["approximate_kl"] / tokens,
            }
        if "pretraining_loss" in sums:
            found["pretraining/loss"] = sums["pretraining_loss"] / sums["policy_updates"]
        if "value_loss" in sums:
            found["critic/loss"] = sums["value_loss"] / sums["critic_updates"]
        for name, info in self.infos.items():
            found |= {f"{name}/grad_norm": info.grad_norm, f"{name}/learning_rate": info.learning_rate}
        return found


class Updater:
    """Runs the minibatches of a step on policy and critic."""

    def __init__(
        self, policy: Engine, critic: Engine | None, config: PpoConfig, pretraining: ItemSource | None = None
    ) -> None:
        """``pretraining``: conversations for the language-modeling term."""
        self._policy, self._critic, self._config = policy, critic, config
        self._ranks = policy.ranks
        self._maker = BatchMaker(policy.ranks, config.train)
        self._pretraining = pretraining
        if config.pretraining is not None:
            self._pretraining_maker = BatchMaker(policy.ranks, config.pretraining_train)

    def run(self, step: int, experience: Experience, kl_coefficient: float) -> UpdateReport:
        """All minibatches of ``step``; every rank must call it."""
        config, report = self._config, UpdateReport()
        warming_up = self._critic is not None and step < config.critic.warmup_steps
        # Of the rollouts at hand: the last step of an epoch may have fewer.
        train = config.train
        count = config.loss.epochs * steps_per_epoch(
            len(experience.rollouts), train.global_batch_size, train.last_batch
        )
        for number in range(step * count, (step + 1) * count):
            batches = self._maker.step(experience.rollouts, number, ahead=number + 1 < (step + 1) * count)
            if not self._counts(experience)["tokens"]:  # all of it is masked
                continue
            report.add({"minibatches": 1.0})
            gap = None
            if not warming_up:
                gap = self._update_policy(number, batches, experience, kl_coefficient, report)
            if self._critic is not None:
                self._update_critic(self._critic, batches, experience, report)
            limit = config.loss.stop_epoch_kl
            if gap is not None and limit is not None and gap > limit:
                report.stopped_early = True
                break
        return report

    def count(self, step: int) -> None:
        """Have the learning rates stand where they belong after ``step``, whether or not all of its updates were made:
        schedules end with the run, also of a policy that rested while the critic warmed up. Every rank must call it."""
        for engine in filter(None, (self._policy, self._critic)):
            engine.move_schedule((step + 1) * self._config.updates)

    # The policy

    def _update_policy(
        self, number: int, batches: list[Batch], experience: Experience, kl_coefficient: float, report: UpdateReport
    ) -> float:
        """Optimizer step ``number``; how far the policy was from the one at rollout, in nats per token (k3)."""
        engine = self._policy
        extra, extra_tokens = self._pretraining_batches(number)
        extra_weight = 0.0 if self._config.pretraining is None else self._config.pretraining.weight
        counts = self._counts(experience)
        seen: dict[str, Tensor] = {}
        for place, batch in enumerate(batches):
            loss, parts = self._policy_loss(batch, experience, counts, kl_coefficient)
            engine.backward(loss, last=not extra and place == len(batches) - 1)
            _accumulate(seen, parts | {"policy_loss": loss.detach()})
        for place, batch in enumerate(extra):
            loss = self._pretraining_loss(batch) / extra_tokens
            engine.backward(loss * extra_weight, last=place == len(extra) - 1)
            _accumulate(seen, {"pretraining_loss": loss.detach()})
        self._close("policy", engine, batches, experience, report)
        sums = self._over_ranks(seen)
        report.add(sums | {"policy_updates": 1.0, "policy_tokens": float(counts["tokens"])})
        return sums["approximate_kl"] / counts["tokens"]

    def _policy_loss(
        self, batch: Batch, experience: Experience, counts: dict[str, int], kl_coefficient: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the loss, and sums over its tokens for the log."""
        config = self._config.loss
        output: PolicyOutput = self._policy.forward(
            batch.buckets, temperature=self._config.rollout.temperature, with_entropies=config.entropy > 0
        )
        logprobs = by_response(output.logprobs, batch)
        rows = experience.rows(batch.host_indices, logprobs.shape[1], logprobs.device)
        old, mask, advantages = rows["old_logprobs"], rows["mask"], rows["advantages"]
        by_token = config.ratio == "token"
        ratios = token_ratios(logprobs, old) if by_token else sequence_ratios(logprobs, old, mask)
        bounds = {"clip_low": config.clip_low, "clip_high": config.upper}
        if config.objective == "clip":
            losses = clipped_surrogate(ratios, advantages, **bounds, dual_clip=config.dual_clip)
            clipped, _ = clipped_share(ratios.detach(), advantages, mask, **bounds)
        else:
            losses = weighted_likelihood(logprobs, ratios, advantages, **bounds)
            clipped = bounded_tokens(ratios.detach(), mask, **bounds)
        if "importance" in rows:
            losses = losses * rows["importance"]
        if self._config.kl.place == "loss":
            losses = losses + kl_coefficient * kl_estimates(logprobs, rows["reference"], self._config.kl.kind)
        if output.entropies is not None:
            losses = losses - config.entropy * by_response(output.entropies, batch)
        gap = (kl_estimates(old, logprobs.detach(), "k3") * mask).sum()
        loss = reduce_tokens(
            losses, mask, normalize=config.normalize, max_tokens=self._config.rollout.max_new_tokens, **counts
        )
        return loss + _alive(output.logprobs), {"clipped": clipped, "approximate_kl": gap}

    def _pretraining_batches(self, number: int) -> tuple[list[Batch], int]:
        """This rank's conversations beside a minibatch, and the response tokens of those of all ranks."""
        if self._pretraining is None:
            return [], 0
        batches = self._pretraining_maker.step(self._pretraining, number)
        mine = sum(int(bucket.response_mask[:, 1:].sum()) for batch in batches for bucket in batch.buckets)
        return batches, max(1, int(self._ranks.sum(torch.tensor(mine, device=self._ranks.device))))

    def _pretraining_loss(self, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of the response tokens of this micro-batch."""
        output: PolicyOutput = self._policy.forward(batch.buckets)
        return -_sum(output.logprobs)

    # The critic

    def _update_critic(
        self, engine: Engine, batches: list[Batch], experience: Experience, report: UpdateReport
    ) -> None:
        counts = self._counts(experience)
        seen: dict[str, Tensor] = {}
        for place, batch in enumerate(batches):
            outputs = engine.forward(batch.buckets)
            values = by_response(outputs, batch)
            rows = experience.rows(batch.host_indices, values.shape[1], values.device)
            losses = clipped_value_loss(
                values, rows["old_values"], rows["returns"], clip=self._config.critic.value_clip
            )
            loss = reduce_tokens(losses, rows["mask"], normalize="token", max_tokens=1, **counts) + _alive(outputs)
            engine.backward(loss, last=place == len(batches) - 1)
            _accumulate(seen, {"value_loss": loss.detach()})
        self._close("critic", engine, batches, experience, report)
        report.add(self._over_ranks(seen) | {"critic_updates": 1.0})

    # Both

    def _counts(self, experience: Experience) -> dict[str, int]:
        """Tokens and sequences of the minibatch that are learned from, over all ranks."""
        mask = experience.mask[torch.from_numpy(self._maker.indices)]
        return {"tokens": int(mask.sum()), "sequences": int(mask.any(dim=1).sum())}

    def _close(
        self, name: str, engine: Engine, batches: list[Batch], experience: Experience, report: UpdateReport
    ) -> None:
        info = engine.step()
        report.infos[name] = info
        if not info.applied:
            report.overflow = info.scaler_overflow
            if not info.scaler_overflow:
                report.skipped += [experience.rollouts.row_ids[index] for index in self._maker.indices]

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        values = self._ranks.sum(torch.stack([value.double() for value in sums.values()]))
        return dict(zip(sums, values.tolist(), strict=True))


def _alive(outputs: Sequence[Tensor]) -> Tensor:
    """Zero, with the graph of a forward: ranks that hold only fillers must run the backward pass, too."""
    return 0.0 * _sum(outputs)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """A scalar: the sum of all entries, part by part."""
    return sum((part.sum() for part in parts), start=parts[0].new_zeros(()))


def _accumulate(total: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        total[name] = total[name] + value if name in total else value
