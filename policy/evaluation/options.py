"""How the responses of an evaluation are drawn."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from policy.generation.options import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(SamplingConfig):
    """How responses are drawn."""

    samples: Annotated[int, Gt(0)] = 4
    """Responses to each prompt."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Makes tokens that prompt or response had before less likely, as generate() of Transformers does it: logits above
    0 are divided by this, others multiplied. 1 for none."""
    seed: int = 0
    """One seed gives one result, on any number of ranks."""

    @property
    def from_the_policy(self) -> bool:
        """Whether responses are drawn from the policy's own distribution, so that mean log-ratios are its KL."""
        return (self.temperature, self.top_p, self.top_k, self.repetition_penalty) == (1.0, 1.0, 0, 1.0)
