"""The loss of pairs whose labels may be wrong."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rlhf.data.options import LabelsConfig


class Labels:
    """Makes the losses of pairs from those of their labels and of the opposite ones, as ``labels`` of a recipe says.

        soft    (1 - w_i) loss_i + w_i opposite_i,   w the probability that the label is wrong
        weight  (1 - w_i) loss_i / mean over all training pairs of (1 - w)

    Everything else is done to the data, before.
    """

    def __init__(self, config: LabelsConfig, wrong: np.ndarray) -> None:
        """``wrong``: ``(N,)`` probabilities that the labels of all training pairs are wrong; read unless as given."""
        audited = config.kind != "as_given"
        self._wrong = torch.from_numpy(np.array(wrong)) if audited and config.use == "soft" else None
        right = 1 - wrong
        self._weights = torch.from_numpy(right / right.mean()) if audited and config.use == "weight" else None

    def losses(self, of: Callable[[bool], Tensor], indices: Tensor) -> Tensor:
        """``(B,)`` losses.

        Args:
            of: from whether labels are opposite to the ``(B,)`` losses of the pairs at hand.
            indices: ``(B,)`` places of these in the training data.
        """
        losses = of(False)
        if self._wrong is not None:
            wrong = self._wrong[indices.cpu()].to(losses)
            return (1 - wrong) * losses + wrong * of(True)
        if self._weights is not None:
            return losses * self._weights[indices.cpu()].to(losses)
        return losses
