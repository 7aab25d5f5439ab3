"""Margins of pairs by small heads that did not see them: trained on frozen features, fold by fold."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reward.losses import bradley_terry_loss

Head = Literal["linear", "mlp"]
LEARNING_RATES: dict[Head, float] = {"linear": 3e-3, "mlp": 1e-3}
"""Highest rate of each head's schedule; inputs are standardized, so that it fits any backbone."""
WARMUP_STEPS = 10
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How a head is trained; the size of the larger one is that of benchmarks/margin_study."""

    head: Head = "mlp"
    """linear, or two layers with ``hidden`` units between them."""
    hidden: int = 1024
    epochs: int = 4
    batch_pairs: int = 64
    learning_rate: float | None = None
    """``None`` for that of :data:`LEARNING_RATES`."""


def prompt_folds(groups: NDArray[np.uint64], folds: int, seed: int) -> NDArray[np.int64]:
    """``(N,)`` fold of each pair: all pairs of a prompt share one, and folds have about as many pairs.

    Args:
        groups: ``(N,)`` equal for pairs of the same prompt.
        folds: how many.
        seed: of the order in which prompts are dealt out.
    Raises:
        ValueError: if there are fewer prompts than folds.
    """
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < folds:
        raise ValueError(f"{len(names)} prompts make no {folds} folds")
    sizes = np.bincount(members)
    order = np.random.default_rng((seed, 0)).permutation(len(names))
    fold_of, filled = np.zeros(len(names), np.int64), np.zeros(folds, np.int64)
    for name in order:  # the emptiest fold next
        fold_of[name] = filled.argmin()
        filled[fold_of[name]] += sizes[name]
    return fold_of[members]


def out_of_fold_margins(
    chosen: Tensor,
    rejected: Tensor,
    fold_of: NDArray[np.int64],
    training: HeadTraining,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float64]:
    """``(N,)`` reward gaps of pairs, each by the head that was trained on all other folds.

    Args:
        chosen, rejected: ``(N, D)`` features of the answers.
        fold_of: ``(N,)`` fold of each pair.
        training: of each head.
        seed: of starts and order.
        advance: told after each head that one more is done.
    """
    margins = np.zeros(len(chosen))
    for fold in range(int(fold_of.max()) + 1):
        seen, judged = torch.from_numpy(fold_of != fold), torch.from_numpy(fold_of == fold)
        answers = torch.cat([chosen[seen], rejected[seen]])
        center, spread = answers.mean(0), answers.std(0).clamp_min(1e-6)
        head = _trained(
            (chosen[seen] - center) / spread, (rejected[seen] - center) / spread, training, seed=seed * 1000 + fold
        )
        with torch.no_grad():
            sides = [head((side[judged] - center) / spread).squeeze(1).double() for side in (chosen, rejected)]
        margins[fold_of == fold] = (sides[0] - sides[1]).numpy()
        advance(1)
    return margins


def _trained(chosen: Tensor, rejected: Tensor, training: HeadTraining, *, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    head = _new_head(chosen.shape[1], training, generator)
    rate = training.learning_rate or LEARNING_RATES[training.head]
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    plan = [
        rows
        for _ in range(training.epochs)
        for rows in torch.randperm(len(chosen), generator=generator).split(training.batch_pairs)
    ]
    for step, rows in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, len(plan))
        rewards = head(torch.cat([chosen[rows], rejected[rows]])).squeeze(1)
        optimizer.zero_grad()
        bradley_terry_loss(*rewards.split(len(rows))).mean().backward()
        optimizer.step()
    return head


def _new_head(features: int, training: HeadTraining, generator: torch.Generator) -> nn.Module:
    """The last layer starts small, so that all rewards start near 0."""
    width = training.hidden if training.head == "mlp" else features
    last = nn.Linear(width, 1, bias=False)
    nn.init.normal_(last.weight, std=1 / (width + 1), generator=generator)
    if training.head == "linear":
        return last
    first = nn.Linear(features, width)
    bound = features**-0.5
    nn.init.uniform_(first.weight, -bound, bound, generator=generator)
    nn.init.uniform_(first.bias, -bound, bound, generator=generator)
    return nn.Sequential(first, nn.ReLU(), last)


def _schedule(step: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up, then cosine to 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, total - WARMUP_STEPS)))
