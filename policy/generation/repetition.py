"""The repetition penalty: tokens that were there before become less likely."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf.core.moving import moved


class RepetitionPenalty:
    """Which tokens each row of a batch has had, and what that does to its logits.

        logit -> logit / penalty where it is positive, else logit * penalty,   for tokens of prompt and response

    Args:
        penalty: > 0; 1 changes nothing.
        prompts: token ids of B rows.
        vocabulary: size of the logits.
        device: of the logits.
    References:
        Keskar et al., arXiv:1909.05858, sec. 4.1, as in Transformers: also for negative logits, and with the prompt.
    """

    def __init__(
        self, penalty: float, prompts: Sequence[NDArray[np.int64]], vocabulary: int, device: torch.device
    ) -> None:
        self._penalty = penalty
        self._seen = torch.zeros((len(prompts), vocabulary), dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self._seen[row, moved(torch.from_numpy(prompt), device)] = True

    def apply(self, logits: Tensor) -> Tensor:
        """``(B, V)`` logits to draw from."""
        lower = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return torch.where(self._seen, lower, logits)

    def add(self, tokens: Tensor) -> None:
        """Each row has written one of ``(B,)`` tokens."""
        self._seen.scatter_(1, tokens[:, None], True)

    def keep(self, index: Tensor) -> None:
        """Row k is what row ``index[k]`` was."""
        self._seen = self._seen[index]

    def join(self, other: "RepetitionPenalty") -> None:
        """The rows of ``other`` come behind those of this one."""
        self._seen = torch.cat([self._seen, other._seen])
