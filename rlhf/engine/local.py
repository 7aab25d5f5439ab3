"""Plain torch in float32: the engine to compare with and to debug on. Several ranks sum gradients."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.engine.api import StepInfo
from rlhf.engine.optimizers import build_optimizer, build_schedule, follow_schedule, move_schedule
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import Ranks


class LocalEngine:
    """The engine in plain torch; see :class:`rlhf.engine.api.Engine`."""

    def __init__(self, module: nn.Module, *, ranks: Ranks, optimizer: OptimizerConfig, total_steps: int) -> None:
        self.ranks = ranks
        self.module = module.to(ranks.device).train()
        self._max_grad_norm = optimizer.max_grad_norm
        self._optimizer = build_optimizer(self.module, optimizer, fused=True)
        self._schedule = build_schedule(self._optimizer, optimizer, total_steps)
        self._trainable = [p for p in self.module.parameters() if p.requires_grad]
        self._bad = torch.zeros((), dtype=torch.bool, device=ranks.device)
        self.settings: dict[str, Any] = {}
        self.shared_out = False
        self.description = f"plain torch, float32, fused torch AdamW, {ranks.world_size} rank(s)"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._bad = self._bad | ~torch.isfinite(loss.detach())
        loss.backward()

    def step(self) -> StepInfo:
        rate = float(self._schedule.get_last_lr()[0])
        if self.ranks.world_size > 1:
            for parameter in self._trainable:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.ranks.sum(parameter.grad)
        limit = self._max_grad_norm or float("inf")
        length = nn.utils.clip_grad_norm_(self._trainable, limit)
        bad = self.ranks.sum((self._bad | ~torch.isfinite(length)).to(length.dtype))
        self._bad = torch.zeros_like(self._bad)
        norm, bad_ranks = torch.stack([length, bad]).tolist()  # the one thing that the device is waited for
        applied = bad_ranks == 0
        if applied:
            self._optimizer.step()
            self._schedule.step()
        self._optimizer.zero_grad()
        return StepInfo(applied, norm, rate)

    def move_schedule(self, steps: int) -> None:
        move_schedule(self._schedule, steps)

    def save(self, folder: Path) -> None:
        if self.ranks.is_main:
            state = {
                "module": self.module.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
            }
            torch.save(state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "engine.pt", map_location=self.ranks.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        follow_schedule(self._schedule)

    def whole(self, tensors: Sequence[Tensor], *, modify: bool = False) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def release(self) -> None:
        pass

    def full_state_dict(self) -> dict[str, Tensor]:
        if not self.ranks.is_main:
            return {}
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
