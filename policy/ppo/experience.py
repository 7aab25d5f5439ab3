"""What is known of the rollouts of a step before the policy is updated: ``(N, W)`` columns, alike on every rank."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from policy.ppo.advantages import (
    clip_scores,
    length_penalty,
    missing_end_penalty,
    token_rewards,
    whiten,
)
from policy.ppo.config import AdvantageConfig, PpoConfig, RewardSourceConfig
from policy.ppo.estimators import ESTIMATORS
from policy.ppo.losses import kl_estimates
from policy.ppo.rollouts import Rollouts
from policy.ppo.scoring import Scored
from policy.ppo.telemetry import correlation, explained_variance, rollout_metrics, sampler_mismatch


@dataclass(frozen=True)
class Measured:
    """What the models say of the tokens of the rollouts."""

    logprobs: Tensor
    """``(N, W)`` log-probabilities under the policy that wrote them, by the training engine."""
    entropies: Tensor
    """``(N, W)`` entropies in nats of the same policy."""
    reference: Tensor
    """``(N, W)`` log-probabilities under the reference."""
    values: Tensor | None
    """``(N, W)`` values of the critic; ``None`` without one."""


@dataclass(frozen=True)
class Experience:
    """What the updates of a step learn from."""

    rollouts: Rollouts
    scored: Scored
    measured: Measured
    rewards: Tensor
    """``(N,)`` scores after clipping and penalties."""
    advantages: Tensor
    """``(N, W)`` advantages; 0 behind a response."""
    returns: Tensor | None
    """``(N, W)`` targets of the critic; ``None`` without one."""

    def rows(self, indices: Tensor, width: int, device: torch.device) -> dict[str, Tensor]:
        """Columns ``(B, width)`` of the rollouts ``indices``, by name, with their mask."""
        columns = {
            "mask": self.rollouts.mask,
            "old_logprobs": self.measured.logprobs,
            "reference": self.measured.reference,
            "advantages": self.advantages,
            "old_values": self.measured.values,
            "returns": self.returns,
        }
        chosen = indices.cpu()
        return {
            name: values[chosen, :width].to(device) for name, values in columns.items() if values is not None
        }


def make_experience(
    rollouts: Rollouts, scored: Scored, measured: Measured, config: PpoConfig, kl_coefficient: float
) -> Experience:
    """Make advantages and returns of scores and log-probabilities."""
    mask = rollouts.mask
    rewards = shaped_scores(scored.scores, rollouts, config.reward, config.rollout.max_new_tokens)
    kl = None
    if config.kl.place == "reward":
        kl = kl_estimates(measured.logprobs, measured.reference, config.kl.kind)
    by_token = token_rewards(rewards, kl, mask, kl_coefficient)
    advantages, returns = estimate(by_token, measured.values, rollouts, config.advantage)
    return Experience(rollouts, scored, measured, rewards, advantages, returns)


def shaped_scores(scores: Tensor, rollouts: Rollouts, config: RewardSourceConfig, max_tokens: int) -> Tensor:
    """``(N,)`` scores, clipped, minus the penalties for a missing end and for length."""
    if config.clip is not None:
        scores = clip_scores(scores, config.clip)
    if config.missing_end_penalty:
        scores = missing_end_penalty(scores, rollouts.ended, config.missing_end_penalty)
    if config.length_penalty:
        scores = scores + length_penalty(
            rollouts.response_lengths,
            free_tokens=config.length_free_tokens,
            max_tokens=max_tokens,
            penalty=config.length_penalty,
        )
    return scores


def estimate(
    rewards: Tensor, values: Tensor | None, rollouts: Rollouts, config: AdvantageConfig
) -> tuple[Tensor, Tensor | None]:
    """``(N, W)`` advantages, whitened if the recipe says so, and returns."""
    found = ESTIMATORS[config.estimator](
        rewards, values, rollouts.mask, rollouts.groups, gamma=config.gamma, lam=config.lam
    )
    advantages = whiten(found.advantages, rollouts.mask) if config.whitened else found.advantages
    return advantages, found.returns


def not_finite(rollouts: Rollouts, scored: Scored, measured: Measured) -> dict[str, list[str]]:
    """What is not finite, with the rows where: empty if all is well."""
    tensors: dict[str, Any] = {"score": scored.scores, "raw score": scored.raw}
    tensors |= {field.name: getattr(measured, field.name) for field in fields(measured)}
    found = {}
    for name, values in tensors.items():
        if values is None:
            continue
        bad = ~torch.isfinite(values.reshape(len(rollouts), -1)).all(dim=1)
        if bool(bad.any()):
            found[name] = [rollouts.row_ids[row] for row in bad.nonzero().flatten().tolist()]
    return found


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Metrics over the rollouts of all ranks."""
    rollouts, measured = experience.rollouts, experience.measured
    mask, ratio = rollouts.mask, measured.logprobs - measured.reference
    tokens = [response.tokens for response in rollouts.responses]
    metrics = rollout_metrics(
        experience.scored.raw, experience.scored.scores, rollouts.response_lengths, rollouts.ended, tokens
    )
    metrics |= {
        "kl": float(ratio.sum(dim=1).mean()),
        "kl_k3": float(kl_estimates(measured.logprobs, measured.reference, "k3").mul(mask).sum(dim=1).mean()),
        "entropy": float(measured.entropies[mask].mean()),
        "advantage_deviation": float(experience.advantages[mask].std(correction=0)),
        "rewarded": float(experience.rewards.mean()),
    }
    if measured.values is not None and experience.returns is not None:
        metrics["explained_variance"] = explained_variance(measured.values, experience.returns, mask)
        metrics["value"] = float(measured.values[mask].mean())
        metrics["value_correlation"] = correlation(measured.values[mask], experience.returns[mask])
    return metrics | sampler_mismatch(rollouts.sampler_logprobs, measured.logprobs, mask)
