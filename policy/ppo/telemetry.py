"""What is logged of a step: plain tensors in, numbers out. All of it is over the rollouts of all ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from policy.ppo.losses import kl_estimates

NGRAM = 4


def response_kl(logprobs: Tensor, reference: Tensor) -> dict[str, float]:
    """Two estimates of a response's KL from the reference, in nats: each that of its tokens, added up.

    Args:
        logprobs: ``(N, W)`` of the policy that wrote the responses; 0 behind them.
        reference: the same of the reference.
    Returns:
        ``kl`` (k1) and ``kl_k3``, means over the responses; see :func:`policy.ppo.losses.kl_estimates`.
    """
    kinds = {"kl": "k1", "kl_k3": "k3"}
    # k3 of the sum of a response's log-ratios has the same mean, and a variance that grows exponentially with it.
    return {
        name: float(kl_estimates(logprobs, reference, kind).double().sum(dim=1).mean()) for name, kind in kinds.items()
    }


def rollout_metrics(lengths: Tensor, ended: Tensor, tokens: Sequence) -> dict[str, float]:
    """Lengths and repetition of N responses.

    Args:
        lengths: ``(N,)`` tokens.
        ended: ``(N,)`` bool.
        tokens: N arrays of token ids.
    """
    return {
        "tokens_per_response": float(lengths.float().mean()),
        "longest_response": float(lengths.max()),
        "ended_share": float(ended.float().mean()),
        "empty_share": float((lengths <= ended.long()).float().mean()),
        "repetition": sum(repetition(each) for each in tokens) / len(tokens),
    }


def repetition(tokens: Sequence[int] | np.ndarray) -> float:
    """Share of a text's 4-grams that have been there before; 0 for texts too short to have one."""
    names = np.asarray(tokens, dtype=np.int64)
    count = len(names) - NGRAM + 1
    if count < 1:
        return 0.0
    for width in (1, NGRAM // 2):  # numbers of tokens, of pairs of tokens, and so on: exact, and they fit into 64 bits
        numbers = np.unique(names, return_inverse=True)[1]
        names = numbers[:-width] * len(numbers) + numbers[width:]
    return 1 - len(np.unique(names)) / count


def correlation(left: Tensor, right: Tensor) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    if len(left) < 2 or not (left.std() > 0 and right.std() > 0):
        return 0.0
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """``1 - Var(returns - values) / Var(returns)`` over the tokens of ``(N, W)``: 1 for a perfect critic, 0 for a
    constant one."""
    seen, target = values[mask], returns[mask]
    spread = target.var(correction=0)
    return 0.0 if spread == 0 else float(1 - (target - seen).var(correction=0) / spread)


def sampler_mismatch(gaps: Tensor) -> dict[str, float]:
    """How far the sampler's log-probabilities lie from those of the training engine: ``(n,)`` nats of n tokens."""
    return {"sampler_gap/mean": float(gaps.abs().mean()), "sampler_gap/max": float(gaps.abs().max())}
