"""A critic without a model of its own: a second adapter, and a head, on the policy's frozen base."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from policy.model import PolicyModel
from policy.ppo.critic import response_values
from reward.heads import Float32Linear, draw
from rlhf.data.batching import LengthBucket, token_blocks
from rlhf.models.hidden_states import last_states
from rlhf.models.trainable import freeze_adapters_below

NAME = "critic"


class SharedTrunkCritic(nn.Module):
    """Values of rows; only its own adapter and head are parameters of this module.

    Build it after the policy's engine, which then knows nothing of the second adapter; not under ZeRO-3.

    Args:
        policy: with LoRA adapters.
        freeze_layers: layers that have no adapter to train, as in the policy.
        seed: of the new weights.
    """

    _hf: PreTrainedModel
    _wrapped: PeftModel
    _layers: list[LoraLayer]

    def __init__(self, policy: PolicyModel, *, freeze_layers: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        (wrapped,) = policy.adapters
        wanted = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
        settings = wrapped.peft_config[wrapped.active_adapter]
        wrapped.add_adapter(NAME, replace(settings))
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(wanted.get(name, True))
        freeze_adapters_below(policy.hf, freeze_layers)
        self._share(policy, wrapped)
        width = policy.hf.config.hidden_size
        self.score = Float32Linear(width, 1, bias=False)
        draw(self.score, 1.0 / (width + 1), torch.Generator().manual_seed(seed))
        self.to(next(policy.parameters()).device)

    def _share(self, policy: PolicyModel, wrapped: PeftModel) -> None:
        layers = [module for module in policy.hf.modules() if isinstance(module, LoraLayer)]
        parts = [part[NAME] for layer in layers for part in (layer.lora_A, layer.lora_B) if NAME in part]
        self.adapters = nn.ModuleList(parts)
        # Not as submodules: the base and the policy's adapters are parameters of the policy alone.
        object.__setattr__(self, "_hf", policy.hf)
        object.__setattr__(self, "_wrapped", wrapped)
        object.__setattr__(self, "_layers", layers)

    def forward(self, buckets: Sequence[LengthBucket]) -> tuple[Tensor, ...]:
        """Values of each bucket; see :meth:`policy.ppo.critic.ValueModel.forward`."""
        with self._active():
            blocks = list(last_states(self._hf, *token_blocks(buckets)))
        return tuple(
            response_values(states, bucket, self.score) for states, bucket in zip(blocks, buckets, strict=True)
        )

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        """The second adapter in the place of the first. peft's own switch would also change what is trained."""
        before = [layer._active_adapter for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = [NAME]
        try:
            yield
        finally:
            for layer, name in zip(self._layers, before, strict=True):
                layer._active_adapter = name

    def remove(self) -> None:
        """Take the second adapter out of the policy, which is then published without it."""
        self._wrapped.delete_adapter(NAME)
