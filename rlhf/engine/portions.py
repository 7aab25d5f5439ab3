"""Values of a model's parameters that are kept beside it: every rank holds an equal part of each, on its CPU."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.core.errors import CheckpointError
from rlhf.engine.frozen import Frozen


class Portions:
    """Values of parameters, as they are when this is made. Every rank must make the same calls.

    A rank never has more than its parts and one whole tensor, whatever shares the model out.

    Args:
        model: whose parameters they are.
        parameters: which of them.
        dtype: of the values; ``None``: that of each parameter.
    """

    def __init__(self, model: Frozen, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None = None) -> None:
        self._model, self._parameters, self._dtype = model, list(parameters), dtype
        self._parts = list(self.of_now())

    @property
    def parts(self) -> Sequence[Tensor]:
        """``(n,)`` values of each parameter, those of this rank."""
        return self._parts

    def of_now(self) -> Iterator[Tensor]:
        """The same parts of the parameters as they are now, one after the other."""
        for parameter in self._parameters:
            with self._model.whole([parameter]):
                values = parameter.detach().reshape(-1)[self._place(parameter.numel())]
                yield values.to("cpu", self._dtype or parameter.dtype, copy=True)

    @torch.no_grad()
    def put(self) -> None:
        """Give the parameters these values."""
        ranks = self._model.ranks
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            values = ranks.gather_rows(part.to(ranks.device, parameter.dtype))
            with self._model.whole([parameter], modify=True):
                parameter.copy_(values.view(parameter.shape))

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Give the parameters these values again behind the block.

        Where the block fails and there are several ranks, they stay as they are: the others may be in the middle of a
        forward, and this rank would wait for them in place of saying what is wrong.
        """
        try:
            yield
        except BaseException:
            if self._model.ranks.world_size == 1:
                self.put()
            raise
        self.put()

    def save(self, folder: Path) -> None:
        """Write the parts of this rank into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self._parts, folder / f"rank{self._model.ranks.rank:05d}.pt")

    def load(self, folder: Path) -> None:
        """Read back what :meth:`save` wrote, on this or on another number of ranks.

        Raises:
            CheckpointError: if it is not there, or of other parameters.
        """
        self._model.ranks.together(lambda: self._read(folder))

    def _read(self, folder: Path) -> None:
        files = sorted(folder.glob("rank?????.pt"))
        written = [torch.load(file, mmap=True, weights_only=True) for file in files]
        if not written or any(len(each) != len(self._parts) for each in written):
            raise CheckpointError(
                f"{folder}: expected {len(self._parts)} tensors, found {[len(each) for each in written] or 'none'}: "
                "the checkpoint is of another version or another model; go on from another one, or begin anew"
            )
        for place, part in enumerate(self._parts):
            whole = torch.cat([each[place] for each in written])
            self._parts[place] = whole[self._place(len(whole))].to(part.dtype, copy=True)

    def _place(self, count: int) -> slice:
        """Which of ``count`` values are this rank's."""
        ranks = self._model.ranks
        size = -(-count // ranks.world_size)
        return slice(ranks.rank * size, (ranks.rank + 1) * size)
