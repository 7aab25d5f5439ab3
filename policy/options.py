"""What a recipe says about the policy."""

from dataclasses import dataclass
from typing import Literal

from rlhf.models.options import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(BackboneConfig):
    """The language model to train."""

    publish_lora: Literal["merged", "adapter"] = "merged"
    """Weights in final/ under LoRA: merged, or the adapter alone (it then needs the base model beside it)."""
