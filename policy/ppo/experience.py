"""What is known of the rollouts of a step before the policy is updated: ``(N, W)`` columns, alike on every rank."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.ppo.advantages import (
    clip_scores,
    length_penalty,
    missing_end_penalty,
    token_rewards,
    whiten,
)
from policy.ppo.config import AdvantageConfig, PpoConfig
from policy.ppo.estimators import ESTIMATORS
from policy.ppo.losses import kl_estimates, truncated_importance
from policy.ppo.reward_options import RewardSourceConfig
from policy.ppo.rollouts import Rollouts
from policy.ppo.scoring import Scored
from policy.ppo.telemetry import correlation, explained_variance, response_kl, rollout_metrics, sampler_mismatch
from rlhf.core.moving import moved


@dataclass(frozen=True)
class Measured:
    """What the models say of the tokens of the rollouts."""

    logprobs: Tensor
    """``(N, W)`` log-probabilities under the policy that wrote them; see ``rollout.logprobs``."""
    entropies: Tensor
    """``(N, W)`` entropies in nats of the same policy."""
    reference: Tensor
    """``(N, W)`` log-probabilities under the reference."""
    values: Tensor | None
    """``(N, W)`` values of the critic; ``None`` without one."""
    sampler_gaps: Tensor
    """``(n,)`` nats between sampler and training engine, of the tokens that both were asked about."""


@dataclass(frozen=True)
class Experience:
    """What the updates of a step learn from."""

    rollouts: Rollouts
    scored: Scored
    measured: Measured
    clipped_share: float
    """Share of the scores that were clipped."""
    rewards: Tensor
    """``(N,)`` scores after clipping and penalties."""
    mask: Tensor
    """``(N, W)`` bool, True on the tokens that are learned from: the rollouts' own, or some responses of them."""
    advantages: Tensor
    """``(N, W)`` advantages; 0 where nothing is learned."""
    returns: Tensor | None
    """``(N, W)`` targets of the critic; ``None`` without one."""
    importance: Tensor | None = None
    """``(N, W)`` weights of the tokens in the policy's loss; ``None``: all count alike."""
    importance_cap: float = 0.0
    """Upper bound of these."""

    def rows(self, indices: NDArray[np.int64], width: int, device: torch.device) -> dict[str, Tensor]:
        """Columns ``(B, width)`` of the rollouts ``indices``, by name, with their mask."""
        columns = {
            "mask": self.mask,
            "old_logprobs": self.measured.logprobs,
            "reference": self.measured.reference,
            "advantages": self.advantages,
            "old_values": self.measured.values,
            "returns": self.returns,
            "importance": self.importance,
        }
        chosen = torch.from_numpy(indices)
        return {name: moved(values[chosen, :width], device) for name, values in columns.items() if values is not None}


def make_experience(
    rollouts: Rollouts, scored: Scored, measured: Measured, config: PpoConfig, kl_coefficient: float
) -> Experience:
    """Make advantages and returns of scores and log-probabilities."""
    rewards = shaped_scores(scored.scores, rollouts, config.reward, config.rollout.max_new_tokens)
    limit = config.reward.score_limit
    clipped = 0.0 if limit is None else float((scored.scores.abs() > limit).float().mean())
    kl = None
    if config.kl.place == "reward":
        kl = kl_estimates(measured.logprobs, measured.reference, config.kl.kind)
    by_token = token_rewards(rewards, kl, rollouts.mask, kl_coefficient)
    learned = learned_responses(rollouts, scored.known, config)
    advantages, returns = estimate(by_token, measured.values, rollouts, learned, config.advantage)
    mask = rollouts.mask & learned[:, None]
    importance, loss = None, config.loss
    if loss.importance != "none":
        sampler, level, cap = rollouts.sampler_logprobs, loss.importance, loss.importance_cap
        importance = truncated_importance(measured.logprobs, sampler, rollouts.mask, level=level, cap=cap)
    return Experience(
        rollouts, scored, measured, clipped, rewards, mask, advantages, returns, importance, loss.importance_cap
    )


def learned_responses(rollouts: Rollouts, known: Tensor, config: PpoConfig) -> Tensor:
    """``(N,)`` bool: the responses that are learned from.

    Those without a score are not, nor, where they are masked, those that were cut off; nor is one that is then left
    alone in its group with nothing to be compared with.
    """
    learned = compared_responses(rollouts, known, config.reward)
    if ESTIMATORS[config.advantage.estimator].needs_groups:
        counts = torch.zeros(int(rollouts.groups.max()) + 1, dtype=torch.long)
        learned = learned & (counts.index_add(0, rollouts.groups, learned.long())[rollouts.groups] > 1)
    return learned


def compared_responses(rollouts: Rollouts, known: Tensor, config: RewardSourceConfig) -> Tensor:
    """``(N,)`` bool: those with a score, without those that were cut off where these are masked."""
    return known & rollouts.ended if config.truncated == "mask" else known


def groups_that_differ(scores: Tensor, compared: Tensor, groups: Tensor) -> Tensor:
    """``(G,)`` bool: whether the responses to a prompt have more than one score, or one that is not finite.

    Args:
        scores: ``(N,)``.
        compared: ``(N,)`` bool; the other responses do not count.
        groups: ``(N,)`` int64 from 0 to G - 1.
    References:
        Yu et al., arXiv:2503.14476, sec. 3.2 (dynamic sampling).
    """
    extremes = [torch.full((int(groups.max()) + 1,), sign * torch.inf) for sign in (1, -1)]
    least, most = (
        start.scatter_reduce(0, groups[compared], scores[compared], reduce=how)
        for start, how in zip(extremes, ("amin", "amax"), strict=True)
    )
    return ~(most <= least)


def shaped_scores(scores: Tensor, rollouts: Rollouts, config: RewardSourceConfig, max_tokens: int) -> Tensor:
    """``(N,)`` scores, clipped, minus the penalties for a missing end and for length."""
    scores = clip_scores(scores, config.score_limit)
    if config.truncated == "penalty":
        scores = torch.where(rollouts.ended, scores, -config.missing_end_penalty)
    elif config.missing_end_penalty:
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
    rewards: Tensor, values: Tensor | None, rollouts: Rollouts, learned: Tensor, config: AdvantageConfig
) -> tuple[Tensor, Tensor | None]:
    """``(N, W)`` advantages, whitened if the recipe says so, and returns.

    They are those of the ``learned`` responses among themselves, and 0 for the others.
    """
    advantages = torch.zeros(rewards.shape)
    returns = None if values is None else torch.zeros(rewards.shape)
    if not bool(learned.any()):
        return advantages, returns
    mask = rollouts.mask[learned]
    found = ESTIMATORS[config.estimator](
        rewards[learned],
        None if values is None else values[learned],
        mask,
        rollouts.groups[learned],
        gamma=config.gamma,
        lam=config.lam,
    )
    advantages[learned] = whiten(found.advantages, mask) if config.whitened else found.advantages
    if returns is not None and found.returns is not None:
        returns[learned] = found.returns
    return advantages, returns


def not_finite(rollouts: Rollouts, scored: Scored, measured: Measured) -> dict[str, list[str]]:
    """What is not finite or not there at all, with the rows where: empty if all is well."""
    tensors: dict[str, Any] = {"score": scored.scores, "raw score": scored.raw}
    tensors |= {name: getattr(measured, name) for name in ("logprobs", "entropies", "reference", "values")}
    found = {}
    if not bool(scored.known.any()):
        found["score (None for every response)"] = rollouts.row_ids
    for name, values in tensors.items():
        if values is None:
            continue
        bad = ~torch.isfinite(values.reshape(len(rollouts), -1)).all(dim=1)
        if bool(bad.any()):
            found[name] = [rollouts.row_ids[row] for row in bad.nonzero().flatten().tolist()]
    if not bool(torch.isfinite(measured.sampler_gaps).all()):  # a few responses stand for all
        found.setdefault("logprobs", rollouts.row_ids)
    return found


def score_metrics(scored: Scored, lengths: Tensor, rewards: Tensor) -> dict[str, float]:
    """Metrics over the responses that have a score, one at least; ``rewards`` are ``(N,)`` scores after penalties."""
    metrics = {
        f"reward/{name}": float(each.scores[each.known].mean())
        for name, each in scored.terms.items()
        if bool(each.known.any())
    }
    if scored.unknown is not None or scored.failed:
        metrics |= {"unscored_share": 1 - float(scored.known.float().mean()), "reward_failures": float(scored.failed)}
    known = scored.known
    scores = scored.scores[known]
    return metrics | {
        "reward": float(scored.raw[known].mean()),
        "score": float(scores.mean()),
        "score_deviation": float(scores.std(correction=0)),
        "length_correlation": correlation(scores, lengths[known].float()),
        "rewarded": float(rewards[known].mean()),
    }


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Metrics over the rollouts of all ranks."""
    rollouts, measured = experience.rollouts, experience.measured
    mask, learned = rollouts.mask, experience.mask
    tokens = [response.tokens for response in rollouts.responses]
    metrics = rollout_metrics(rollouts.response_lengths, rollouts.ended, tokens)
    metrics |= score_metrics(experience.scored, rollouts.response_lengths, experience.rewards)
    metrics |= {
        **response_kl(measured.logprobs, measured.reference),
        "entropy": float(measured.entropies[mask].mean()),
        "clipped_share": experience.clipped_share,
        "masked_share": 1 - float(learned.any(dim=1).float().mean()),
    }
    if not bool(learned.any()):
        return metrics | sampler_mismatch(measured.sampler_gaps)
    if experience.importance is not None:
        weights = experience.importance[learned]
        metrics["importance/mean"] = float(weights.mean())
        metrics["importance/capped_share"] = float((weights >= experience.importance_cap).float().mean())
    metrics["advantage_deviation"] = float(experience.advantages[learned].std(correction=0))
    if measured.values is not None and experience.returns is not None:
        metrics["explained_variance"] = explained_variance(measured.values, experience.returns, learned)
        metrics["value"] = float(measured.values[learned].mean())
        metrics["value_correlation"] = correlation(measured.values[learned], experience.returns[learned])
    return metrics | sampler_mismatch(measured.sampler_gaps)
